// Arithmetic of f16, bf16 and pairs of them. PTX ISA 9.7.4.
#include "floats.h"

namespace ptx {

namespace {

struct F16 {
    static constexpr uint16_t NOT_A_NUMBER = 0x7FFF, INFINITE = 0x7C00, ONE = 0x3C00;
    static float get(uint16_t bits) { return from_f16(bits); }
    static uint16_t put(float x) { return to_f16(x); }
    static uint16_t put(double x) { return FormatF16::encode(x); }
};
struct BF16 {
    static constexpr uint16_t NOT_A_NUMBER = 0x7FFF, INFINITE = 0x7F80, ONE = 0x3F80;
    static float get(uint16_t bits) { return from_bf16(bits); }
    static uint16_t put(float x) { return to_bf16(x); }
    static uint16_t put(double x) { return FormatBF16::encode(x); }
};

constexpr int64_t Sat = 1, Flush = 2, Relu = 4;

template <class H> bool is_nan(uint16_t bits) { return (bits & 0x7FFF) > H::INFINITE; }
template <class H> uint16_t flushed(uint16_t bits) {
    return (bits & 0x7FFF) < (H::INFINITE & -H::INFINITE) ? bits & 0x8000 : bits;
}

template <class H> uint16_t finish(uint16_t bits, int64_t how) {
    if (how & Flush) bits = flushed<H>(bits);
    if (how & (Sat | Relu) && bits & 0x8000) bits = 0;
    if (how & Sat && bits > H::ONE) bits = is_nan<H>(bits) ? 0 : H::ONE;
    return bits;
}

// The sums and products of halves are exact in float or lose nothing by being rounded twice; products of bf16 may be
// too small for float, and fma needs the sum's last place to tell what was lost.
template <class H> struct Plus {
    static uint16_t of(uint16_t a, uint16_t b) { return H::put(H::get(a) + H::get(b)); }
};
template <class H> struct Minus {
    static uint16_t of(uint16_t a, uint16_t b) { return H::put(H::get(a) - H::get(b)); }
};
template <class H> struct Times {
    static uint16_t of(uint16_t a, uint16_t b) {
        if (std::is_same_v<H, F16>) return H::put(H::get(a) * H::get(b));
        return H::put((double)H::get(a) * (double)H::get(b));
    }
};
template <class H> struct TimesPlus {
    static uint16_t of(uint16_t a, uint16_t b, uint16_t c) {
        return H::put(add_to_odd((double)H::get(a) * (double)H::get(b), (double)H::get(c)));
    }
};

// Lanes of both halves of a pair are one row of 64 values; `step` of them belong to a lane.
template <class F> void each_half(Mask active, unsigned step, F f) {
    each_lane(active, [&](unsigned lane) {
        for (unsigned k = 0; k < step; k++) f(lane * step + k);
    });
}

template <class H, class Operation, unsigned reads, unsigned step>
Step arithmetic_run(Warp& warp, const Instruction& i, Mask active) {
    uint16_t* d = warp.values<uint16_t>(i.slot[0]);
    const uint16_t* in[3] = {};
    for (unsigned k = 0; k < reads; k++) in[k] = warp.values<uint16_t>(i.slot[k + 1]);
    int64_t how = i.number[0];
    each_half(active, step, [&](unsigned at) {
        uint16_t x[3] = {};
        for (unsigned k = 0; k < reads; k++) x[k] = how & Flush ? flushed<H>(in[k][at]) : in[k][at];
        if constexpr (reads == 2) d[at] = finish<H>(Operation::of(x[0], x[1]), how);
        else d[at] = finish<H>(Operation::of(x[0], x[1], x[2]), how);
    });
    return Step::Next;
}

template <class Make> Handler by_half(Decoder& d, Type type, Make make) {
    auto one = std::integral_constant<unsigned, 1>{};
    auto two = std::integral_constant<unsigned, 2>{};
    if (type.is(Type::Float, 2)) return make(Tag<F16>{}, one);
    if (type.kind == Type::FloatPair) return make(Tag<F16>{}, two);
    if (type.kind == Type::Brain) return make(Tag<BF16>{}, one);
    if (type.kind == Type::BrainPair) return make(Tag<BF16>{}, two);
    d.unsupported("a type of halves was expected");
}

template <template <class> class Operation, unsigned reads> void arithmetic(Decoder& d) {
    d.ignore({"rn"});
    d.out.number[0] = (d.has("sat") ? Sat : 0) | (d.has("ftz") ? Flush : 0) | (reads == 3 && d.has("relu") ? Relu : 0);
    Type type = d.type();
    same_type(d, type, reads);
    d.out.run = by_half(d, type, [](auto half, auto step) -> Handler {
        using H = PTX_TYPE(half);
        return arithmetic_run<H, Operation<H>, reads, decltype(step)::value>;
    });
}

// ---- neg, abs: only the sign's bit changes
template <class H, bool magnitude, unsigned step> Step sign_run(Warp& warp, const Instruction& i, Mask active) {
    uint16_t* d = warp.values<uint16_t>(i.slot[0]);
    const uint16_t* a = warp.values<uint16_t>(i.slot[1]);
    bool ftz = i.number[0];
    each_half(active, step, [&](unsigned at) {
        uint16_t bits = ftz ? flushed<H>(a[at]) : a[at];
        d[at] = magnitude ? bits & 0x7FFF : bits ^ 0x8000;
    });
    return Step::Next;
}

template <bool magnitude> void sign(Decoder& d) {
    d.out.number[0] = d.has("ftz");
    Type type = d.type();
    same_type(d, type, 1);
    d.out.run = by_half(d, type, [](auto half, auto step) -> Handler {
        return sign_run<PTX_TYPE(half), magnitude, decltype(step)::value>;
    });
}

// ---- min, max
constexpr int64_t KeepNan = 1, FlushInputs = 2, Magnitudes = 4, Three = 8;

uint16_t ordered(uint16_t bits) { return bits & 0x8000 ? ~bits : bits | 0x8000; }   // as unsigned numbers; -0 < +0

template <class H, bool largest> uint16_t extreme(uint16_t a, uint16_t b, bool keep_nan) {
    if (is_nan<H>(a) || is_nan<H>(b)) {
        if (keep_nan || (is_nan<H>(a) && is_nan<H>(b))) return H::NOT_A_NUMBER;
        return is_nan<H>(a) ? b : a;
    }
    return (ordered(a) < ordered(b)) == largest ? b : a;
}

template <class H, bool largest, unsigned step> Step extreme_run(Warp& warp, const Instruction& i, Mask active) {
    uint16_t* d = warp.values<uint16_t>(i.slot[0]);
    const uint16_t* in[3] = {warp.values<uint16_t>(i.slot[1]), warp.values<uint16_t>(i.slot[2]), nullptr};
    int64_t how = i.number[0];
    bool keep = how & KeepNan;
    if (how & Three) in[2] = warp.values<uint16_t>(i.slot[3]);
    each_half(active, step, [&](unsigned at) {
        uint16_t a = in[0][at], b = in[1][at];
        if (how & FlushInputs) a = flushed<H>(a), b = flushed<H>(b);
        uint16_t result;
        if (how & Magnitudes) {
            uint16_t magnitude = extreme<H, largest>(a & 0x7FFF, b & 0x7FFF, keep);
            result = is_nan<H>(magnitude) ? magnitude : magnitude | ((a ^ b) & 0x8000);
        } else {
            result = extreme<H, largest>(a, b, keep);
        }
        if (how & Three) {
            uint16_t c = how & FlushInputs ? flushed<H>(in[2][at]) : in[2][at];
            result = extreme<H, largest>(result, c, keep);
        }
        d[at] = result;
    });
    return Step::Next;
}

template <bool largest> void min(Decoder& d) {
    bool three = d.operands() == 4, magnitudes = d.has("xorsign");
    if (magnitudes != d.has("abs")) d.unsupported(".xorsign and .abs come together");
    d.out.number[0] = (d.has("NaN") ? KeepNan : 0) | (d.has("ftz") ? FlushInputs : 0) | (magnitudes ? Magnitudes : 0) |
                      (three ? Three : 0);
    Type type = d.type();
    same_type(d, type, three ? 3 : 2);
    d.out.run = by_half(d, type, [](auto half, auto step) -> Handler {
        return extreme_run<PTX_TYPE(half), largest, decltype(step)::value>;
    });
}

// ---- ex2, tanh: by way of float
template <class H, float (*f)(float), unsigned step> Step approximate(Warp& warp, const Instruction& i, Mask active) {
    uint16_t* d = warp.values<uint16_t>(i.slot[0]);
    const uint16_t* a = warp.values<uint16_t>(i.slot[1]);
    bool ftz = i.number[0];
    each_half(active, step, [&](unsigned at) {
        uint16_t result = H::put(f(H::get(ftz ? flushed<H>(a[at]) : a[at])));
        d[at] = ftz ? flushed<H>(result) : result;
    });
    return Step::Next;
}

template <float (*f)(float)> void function(Decoder& d) {
    d.ignore({"approx"});
    d.out.number[0] = d.has("ftz");
    Type type = d.type();
    same_type(d, type, 1);
    d.out.run = by_half(d, type, [](auto half, auto step) -> Handler {
        return approximate<PTX_TYPE(half), f, decltype(step)::value>;
    });
}

}  // namespace

Table half_instructions() {
    return {
        {"add", "9.7.4.1", arithmetic<Plus, 2>, Of::Halves},
        {"sub", "9.7.4.2", arithmetic<Minus, 2>, Of::Halves},
        {"mul", "9.7.4.3", arithmetic<Times, 2>, Of::Halves},
        {"fma", "9.7.4.4", arithmetic<TimesPlus, 3>, Of::Halves},
        {"neg", "9.7.4.5", sign<false>, Of::Halves},
        {"abs", "9.7.4.6", sign<true>, Of::Halves},
        {"min", "9.7.4.7", min<false>, Of::Halves},
        {"max", "9.7.4.8", min<true>, Of::Halves},
        {"tanh", "9.7.4.9", function<hyperbolic_tangent>, Of::Halves},            // 2^-10.987, bf16: 2^-8
        {"ex2", "9.7.4.10", function<two_to>, Of::Halves},                        // 2^-9.9, bf16: 2^-7
    };
}

}  // namespace ptx

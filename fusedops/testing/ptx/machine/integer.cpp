// Integer arithmetic. PTX ISA 9.7.1; sums with a carry are in carry.cpp.
#include <limits>

#include "pick.h"

namespace ptx {

namespace {

template <class T> using Wider = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T> using Unsigned = std::make_unsigned_t<T>;

template <class T> T plus(T a, T b) { return a + b; }
template <class T> T minus(T a, T b) { return a - b; }
template <class T> T low(T a, T b) { return (T)((Wider<T>)a * b); }
template <> uint64_t low(uint64_t a, uint64_t b) { return a * b; }
template <class T> T high(T a, T b) { return (T)((Wider<T>)a * b >> 8 * sizeof(T)); }
template <class T> Wider<T> wide(T a, T b) { return (Wider<T>)a * b; }
template <class T> T low_plus(T a, T b, T c) { return low(a, b) + c; }
template <class T> T high_plus(T a, T b, T c) { return (Unsigned<T>)high(a, b) + (Unsigned<T>)c; }
template <class T> T smaller(T a, T b) { return a < b ? a : b; }
template <class T> T larger(T a, T b) { return a > b ? a : b; }
template <class T> T positive(T x) { return x > 0 ? x : 0; }
template <class T> T smaller_relu(T a, T b) { return positive(smaller(a, b)); }
template <class T> T larger_relu(T a, T b) { return positive(larger(a, b)); }
template <class T> T absolute(T a) { return a < 0 ? (T)(0 - (Unsigned<T>)a) : a; }
template <class T> T negated(T a) { return (T)(0 - (Unsigned<T>)a); }

// Division by zero has no defined result; these are what the hardware's own routines give.
template <class T> T quotient(T a, T b) {
    if (b == 0) return (T)-1;
    if (std::is_signed_v<T> && b == (T)-1) return negated((std::make_signed_t<T>)a);
    return a / b;
}
template <class T> T remainder(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == (T)-1) return 0;
    return a % b;
}

int32_t clamp32(int64_t x) { return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : (int32_t)x; }
int32_t plus_saturated(int32_t a, int32_t b) { return clamp32((int64_t)a + b); }
int32_t minus_saturated(int32_t a, int32_t b) { return clamp32((int64_t)a - b); }
int32_t high_plus_saturated(int32_t a, int32_t b, int32_t c) { return clamp32((int64_t)high(a, b) + c); }

// f in both halves of 32 bits.
template <class T, T (*f)(T, T)> uint32_t in_pairs(uint32_t a, uint32_t b) {
    uint16_t high = f((T)(a >> 16), (T)(b >> 16)), low = f((T)a, (T)b);
    return (uint32_t)high << 16 | low;
}
template <class T, T (*f)(T)> uint32_t in_pairs(uint32_t a) {
    return (uint32_t)(uint16_t)f((T)(a >> 16)) << 16 | (uint16_t)f((T)a);
}

bool is_pair(Type type) { return type.kind == Type::UnsignedPair || type.kind == Type::SignedPair; }

// ---- add, sub, mul, mad, sad, div, rem, abs, neg, min, max
template <bool subtract> void add(Decoder& d) {
    bool saturated = d.has("sat");
    Type type = d.type();
    same_type(d, type, 2);
    if (saturated) {
        if (!type.is(Type::Signed, 4)) d.unsupported(".sat is for s32");
        d.out.run = subtract ? binary<int32_t, int32_t, minus_saturated> : binary<int32_t, int32_t, plus_saturated>;
    } else if (is_pair(type)) {
        d.out.run = subtract ? binary<uint32_t, uint32_t, in_pairs<uint16_t, minus>>
                             : binary<uint32_t, uint32_t, in_pairs<uint16_t, plus>>;
    } else {
        d.out.run = by_unsigned(d, type, [](auto tag) -> Handler {
            using T = PTX_TYPE(tag);
            return subtract ? binary<T, T, minus<T>> : binary<T, T, plus<T>>;
        });
    }
}

template <class T> Step multiply_add_wide(Warp& warp, const Instruction& i, Mask active) {
    using R = Wider<T>;
    R* d = warp.values<R>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]);
    const R* c = warp.values<R>(i.slot[3]);
    each_lane(active, [&](unsigned lane) { d[lane] = (Unsigned<R>)wide(a[lane], b[lane]) + (Unsigned<R>)c[lane]; });
    return Step::Next;
}

Handler wide_handler(Decoder& d, Type type, bool sum) {
    if (type.bytes == 8) d.unsupported(".wide is for 16 and 32 bits");
    return by_integer(d, type, [&](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        if constexpr (sizeof(T) < 8) return sum ? multiply_add_wide<T> : binary<T, Wider<T>, wide<T>>;
        else return nullptr;
    });
}

template <bool sum> void mul(Decoder& d) {
    std::string part = d.one_of({"lo", "hi", "wide"});
    bool saturated = d.has("sat");
    Type type = d.type();
    if (part == "wide") {
        Type result{type.kind, type.bytes * 2};
        d.out.slot[0] = d.write(0, result);
        d.out.slot[1] = d.read(1, type), d.out.slot[2] = d.read(2, type);
        if (sum) d.out.slot[3] = d.read(3, result);
        d.out.run = wide_handler(d, type, sum);
        return;
    }
    same_type(d, type, sum ? 3 : 2);
    if (saturated) {
        if (!sum || part == "lo" || !type.is(Type::Signed, 4)) d.unsupported(".sat is for mad.hi.s32");
        d.out.run = ternary<int32_t, int32_t, high_plus_saturated>;
    } else if (part == "lo") {
        d.out.run = by_unsigned(d, type, [](auto tag) -> Handler {
            using T = PTX_TYPE(tag);
            return sum ? (Handler)ternary<T, T, low_plus<T>> : (Handler)binary<T, T, low<T>>;
        });
    } else {
        d.out.run = by_integer(d, type, [](auto tag) -> Handler {
            using T = PTX_TYPE(tag);
            return sum ? (Handler)ternary<T, T, high_plus<T>> : (Handler)binary<T, T, high<T>>;
        });
    }
}

// Of the 48 bits of a product of two 24-bit numbers: the lower 32, or the upper 32.
template <class T> int64_t product24(T a, T b) {
    return (int64_t)(T)((T)((uint32_t)a << 8) >> 8) * (int64_t)(T)((T)((uint32_t)b << 8) >> 8);
}
template <class T, bool upper> T multiplied24(T a, T b) { return (T)(product24(a, b) >> (upper ? 16 : 0)); }
template <class T, bool upper> T multiplied24_plus(T a, T b, T c) {
    return (uint32_t)multiplied24<T, upper>(a, b) + (uint32_t)c;
}
int32_t multiplied24_plus_saturated(int32_t a, int32_t b, int32_t c) {
    return clamp32((int64_t)multiplied24<int32_t, true>(a, b) + c);
}

template <class T, bool sum> Handler handler24(bool upper) {
    if (sum) return upper ? ternary<T, T, multiplied24_plus<T, true>> : ternary<T, T, multiplied24_plus<T, false>>;
    return upper ? binary<T, T, multiplied24<T, true>> : binary<T, T, multiplied24<T, false>>;
}

template <bool sum> void mul24(Decoder& d) {
    bool upper = d.one_of({"lo", "hi"}) == "hi", saturated = d.has("sat");
    Type type = d.type();
    if (type.bytes != 4) d.unsupported("u32 or s32 was expected");
    same_type(d, type, sum ? 3 : 2);
    bool is_signed = type.kind == Type::Signed;
    if (saturated && !(sum && upper && is_signed)) d.unsupported(".sat is for mad24.hi.s32");
    d.out.run = is_signed ? handler24<int32_t, sum>(upper) : handler24<uint32_t, sum>(upper);
    if (saturated) d.out.run = ternary<int32_t, int32_t, multiplied24_plus_saturated>;
}

template <class T> T distance_plus(T a, T b, T c) {
    return (T)((Unsigned<T>)c + (a < b ? (Unsigned<T>)b - (Unsigned<T>)a : (Unsigned<T>)a - (Unsigned<T>)b));
}

void sad(Decoder& d) {
    Type type = d.type();
    same_type(d, type, 3);
    d.out.run = by_integer(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return ternary<T, T, distance_plus<T>>;
    });
}

template <bool rest> void div(Decoder& d) {
    Type type = d.type();
    same_type(d, type, 2);
    d.out.run = by_integer(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return rest ? binary<T, T, remainder<T>> : binary<T, T, quotient<T>>;
    });
}

template <bool magnitude> void abs(Decoder& d) {
    Type type = d.type();
    same_type(d, type, 1);
    if (type.kind == Type::SignedPair && !magnitude) {
        d.out.run = unary<uint32_t, uint32_t, in_pairs<int16_t, negated>>;
        return;
    }
    if (type.kind != Type::Signed) d.unsupported("a signed type was expected");
    d.out.run = by_integer(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return magnitude ? unary<T, T, absolute<T>> : unary<T, T, negated<T>>;
    });
}

template <bool largest> Handler extremum_of_pairs(Decoder& d, Type type, bool relu) {
    if (type.kind == Type::UnsignedPair) {
        if (relu) d.unsupported(".relu is for signed types");
        return binary<uint32_t, uint32_t, in_pairs<uint16_t, largest ? larger<uint16_t> : smaller<uint16_t>>>;
    }
    using S = int16_t;
    if (relu) return binary<uint32_t, uint32_t, in_pairs<S, largest ? larger_relu<S> : smaller_relu<S>>>;
    return binary<uint32_t, uint32_t, in_pairs<S, largest ? larger<S> : smaller<S>>>;
}

template <bool largest> void min(Decoder& d) {
    bool relu = d.has("relu");
    Type type = d.type();
    same_type(d, type, 2);
    if (is_pair(type)) d.out.run = extremum_of_pairs<largest>(d, type, relu);
    else if (relu) {
        if (!type.is(Type::Signed, 4)) d.unsupported(".relu is for s32 and s16x2");
        d.out.run = binary<int32_t, int32_t, largest ? larger_relu<int32_t> : smaller_relu<int32_t>>;
    } else {
        d.out.run = by_integer(d, type, [](auto tag) -> Handler {
            using T = PTX_TYPE(tag);
            return binary<T, T, largest ? larger<T> : smaller<T>>;
        });
    }
}

// ---- dp4a, dp2a: products of bytes summed into 32 bits
template <class A, class B> uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
    for (unsigned k = 0; k < 32; k += 8) c += (int32_t)(A)(a >> k) * (int32_t)(B)(b >> k);
    return c;
}
template <class A, class B, unsigned from> uint32_t dot2(uint32_t a, uint32_t b, uint32_t c) {
    using Wide = std::conditional_t<std::is_signed_v<A>, int16_t, uint16_t>;
    for (unsigned k = 0; k < 2; k++) c += (int32_t)(Wide)(a >> 16 * k) * (int32_t)(B)(b >> (8 * k + from));
    return c;
}

template <class A, class B> Handler dot_handler(const std::string& half) {
    if (half == "lo") return ternary<uint32_t, uint32_t, dot2<A, B, 0>>;
    if (half == "hi") return ternary<uint32_t, uint32_t, dot2<A, B, 16>>;
    return ternary<uint32_t, uint32_t, dot4<A, B>>;
}

void dot(Decoder& d, const std::string& half) {
    bool a = d.type().kind == Type::Signed, b = d.type().kind == Type::Signed;
    same_type(d, B32, 3);
    d.out.run = a ? b ? dot_handler<int8_t, int8_t>(half) : dot_handler<int8_t, uint8_t>(half)
                  : b ? dot_handler<uint8_t, int8_t>(half) : dot_handler<uint8_t, uint8_t>(half);
}
void dp4a(Decoder& d) { dot(d, ""); }
void dp2a(Decoder& d) { dot(d, d.one_of({"lo", "hi"})); }

}  // namespace

Table integer_instructions() {
    return {
        {"add", "9.7.1.1", add<false>, Of::Integers},
        {"sub", "9.7.1.2", add<true>, Of::Integers},
        {"mul", "9.7.1.3", mul<false>, Of::Integers},
        {"mad", "9.7.1.4", mul<true>, Of::Integers},
        {"mul24", "9.7.1.5", mul24<false>},
        {"mad24", "9.7.1.6", mul24<true>},
        {"sad", "9.7.1.7", sad},
        {"div", "9.7.1.8", div<false>, Of::Integers},
        {"rem", "9.7.1.9", div<true>},
        {"abs", "9.7.1.10", abs<true>, Of::Integers},
        {"neg", "9.7.1.11", abs<false>, Of::Integers},
        {"min", "9.7.1.12", min<false>, Of::Integers},
        {"max", "9.7.1.13", min<true>, Of::Integers},
        {"dp4a", "9.7.1.23", dp4a},
        {"dp2a", "9.7.1.24", dp2a},
    };
}

}  // namespace ptx

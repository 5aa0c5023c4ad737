// Arithmetic of f32 and f64. PTX ISA 9.7.3; the approximations are in approximation.cpp.
#include "floats.h"

namespace ptx {

namespace {

struct Plus { template <class T> static T of(T a, T b) { return a + b; } };
struct Minus { template <class T> static T of(T a, T b) { return a - b; } };
struct Times { template <class T> static T of(T a, T b) { return a * b; } };
struct TimesPlus { template <class T> static T of(T a, T b, T c) { return std::fma(a, b, c); } };
struct Over { template <class T> static T of(T a, T b) { return a / b; } };
struct Reciprocal { template <class T> static T of(T a) { return 1 / a; } };
struct SquareRoot { template <class T> static T of(T a) { return std::sqrt(a); } };

template <class Operation, class T, bool ftz, bool sat> T one(T a) {
    return finish<ftz, sat>(Operation::of(start<ftz>(a)));
}
template <class Operation, class T, bool ftz, bool sat> T two(T a, T b) {
    return finish<ftz, sat>(Operation::of(start<ftz>(a), start<ftz>(b)));
}
template <class Operation, class T, bool ftz, bool sat> T three(T a, T b, T c) {
    return finish<ftz, sat>(Operation::of(start<ftz>(a), start<ftz>(b), start<ftz>(c)));
}

template <Handler nearest> Step directed(Warp& warp, const Instruction& i, Mask active) {
    RoundTo rounding((Rounding)i.number[0]);
    return nearest(warp, i, active);
}

// The operation with the rounding, .ftz and .sat that the statement asks for.
template <class Operation, unsigned reads> void arithmetic(Decoder& d) {
    Rounding rounding = rounding_of(d.one_of({"rn", "rz", "rm", "rp"}, false));
    bool ftz = d.has("ftz"), sat = d.has("sat");
    Type type = d.type();
    if (type.bytes == 8 && (ftz || sat)) d.unsupported(".ftz and .sat are for f32");
    same_type(d, type, reads);
    d.out.number[0] = (int64_t)rounding;
    d.out.run = by_float(d, type, [&](auto tag) {
        return by_flag(ftz, [&](auto flush) {
            return by_flag(sat, [&](auto saturate) {
                using T = PTX_TYPE(tag);
                constexpr bool f = decltype(flush)::value, s = decltype(saturate)::value;
                constexpr Handler nearest = [] {
                    if constexpr (reads == 1) return (Handler)unary<T, T, one<Operation, T, f, s>>;
                    else if constexpr (reads == 2) return (Handler)binary<T, T, two<Operation, T, f, s>>;
                    else return (Handler)ternary<T, T, three<Operation, T, f, s>>;
                }();
                return rounding == Rounding::NearestEven ? nearest : directed<nearest>;
            });
        });
    });
}

// ---- div, rcp, sqrt: correctly rounded with a rounding, an approximation without one
bool is_approximation(Decoder& d) { return d.has("approx") || d.has("full"); }

void div(Decoder& d) { is_approximation(d) ? approximate_div(d) : arithmetic<Over, 2>(d); }
void rcp(Decoder& d) { is_approximation(d) ? approximate_rcp(d) : arithmetic<Reciprocal, 1>(d); }
void sqrt(Decoder& d) { is_approximation(d) ? approximate_sqrt(d) : arithmetic<SquareRoot, 1>(d); }

// ---- min, max
template <class T> bool is_negative(T x) { return std::signbit(x); }

// -0 is less than +0. A NaN gives way to a number, or with .NaN prevails.
template <bool largest, bool nan, class T> T extreme(T a, T b) {
    bool first = largest ? a > b || (a == b && !is_negative(a)) : a < b || (a == b && is_negative(a));
    T numbers = first ? a : b;
    if (nan) return a != a ? a : b != b ? b : numbers;
    return a != a ? b : b != b ? a : numbers;
}
template <bool largest, bool nan, bool ftz, class T> T extreme_of_two(T a, T b) {
    return canonical(extreme<largest, nan>(start<ftz>(a), start<ftz>(b)));
}
template <bool largest, bool nan, bool ftz> float extreme_of_three(float a, float b, float c) {
    a = start<ftz>(a), b = start<ftz>(b), c = start<ftz>(c);
    return canonical(extreme<largest, nan>(extreme<largest, nan>(a, b), c));
}
// .xorsign.abs: the magnitude that wins, with the product's sign.
template <bool largest, bool nan, bool ftz> float extreme_magnitude(float a, float b) {
    float magnitude = extreme<largest, nan>(std::fabs(start<ftz>(a)), std::fabs(start<ftz>(b)));
    uint32_t sign = (bit_cast<uint32_t>(a) ^ bit_cast<uint32_t>(b)) & 0x80000000;
    return canonical(bit_cast<float>(bit_cast<uint32_t>(magnitude) ^ sign));
}

enum class Form { Two, Three, Magnitude };

template <bool largest, bool nan, bool ftz> Handler extreme_handler(Form form) {
    switch (form) {
    case Form::Three: return ternary<float, float, extreme_of_three<largest, nan, ftz>>;
    case Form::Magnitude: return binary<float, float, extreme_magnitude<largest, nan, ftz>>;
    default: return binary<float, float, extreme_of_two<largest, nan, ftz, float>>;
    }
}

template <bool largest> void min(Decoder& d) {
    bool ftz = d.has("ftz"), nan = d.has("NaN"), magnitude = d.has("xorsign");
    if (magnitude != d.has("abs")) d.unsupported(".xorsign and .abs come together");
    Type type = d.type();
    bool three = d.operands() == 4;
    same_type(d, type, three ? 3 : 2);
    if (type.bytes == 8) {
        if (ftz || nan || magnitude || three) d.unsupported("this form is for f32");
        d.out.run = binary<double, double, extreme_of_two<largest, false, false, double>>;
        return;
    }
    Form form = three ? Form::Three : magnitude ? Form::Magnitude : Form::Two;
    if (three && magnitude) d.unsupported("two operands were expected");
    d.out.run = nan ? ftz ? extreme_handler<largest, true, true>(form) : extreme_handler<largest, true, false>(form)
                    : ftz ? extreme_handler<largest, false, true>(form) : extreme_handler<largest, false, false>(form);
}

// ---- signs and classes: the bits of a NaN are kept
template <class T> T without_sign(T a) { return std::fabs(a); }
template <class T> T other_sign(T a) { return -a; }
float flushed_without_sign(float a) { return std::fabs(flush(a)); }
float flushed_other_sign(float a) { return -flush(a); }
template <class T> T with_sign(T sign, T magnitude) { return std::copysign(magnitude, sign); }

template <bool magnitude> void abs(Decoder& d) {
    bool ftz = d.has("ftz");
    Type type = d.type();
    same_type(d, type, 1);
    d.out.run = by_float(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return magnitude ? unary<T, T, without_sign<T>> : unary<T, T, other_sign<T>>;
    });
    if (!ftz) return;
    if (type.bytes == 8) d.unsupported(".ftz is for f32");
    d.out.run = magnitude ? unary<float, float, flushed_without_sign> : unary<float, float, flushed_other_sign>;
}

void copysign(Decoder& d) {                           // copysign d, a, b: the sign of a, the magnitude of b
    Type type = d.type();
    same_type(d, type, 2);
    d.out.run = by_float(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return binary<T, T, with_sign<T>>;
    });
}

enum Class { Finite, Infinite, Number, NotANumber, Normal, Subnormal };

template <class T> Step test(Warp& warp, const Instruction& i, Mask active) {
    const T* a = warp.values<T>(i.slot[1]);
    Mask result = 0;
    each_lane(active, [&](unsigned lane) {
        T x = a[lane];
        bool holds = i.number[0] == Finite ? std::isfinite(x) : i.number[0] == Infinite ? std::isinf(x)
                     : i.number[0] == Number ? x == x : i.number[0] == NotANumber ? x != x
                     : i.number[0] == Normal ? std::isnormal(x)
                                             : x != 0 && std::fabs(x) < std::numeric_limits<T>::min();
        result |= (Mask)holds << lane;
    });
    warp.set_predicate(i.slot[0], result, active);
    return Step::Next;
}

void testp(Decoder& d) {
    std::string which = d.one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
    d.out.number[0] = which == "finite" ? Finite : which == "infinite" ? Infinite : which == "number" ? Number
                      : which == "notanumber" ? NotANumber : which == "normal" ? Normal : Subnormal;
    Type type = d.type();
    d.out.slot[0] = d.write(0, PRED);
    d.out.slot[1] = d.read(1, type);
    d.out.run = by_float(d, type, [](auto tag) -> Handler { return test<PTX_TYPE(tag)>; });
}

}  // namespace

Table floating_instructions() {
    return {
        {"testp", "9.7.3.1", testp},
        {"copysign", "9.7.3.2", copysign},
        {"add", "9.7.3.3", arithmetic<Plus, 2>, Of::Floats},
        {"sub", "9.7.3.4", arithmetic<Minus, 2>, Of::Floats},
        {"mul", "9.7.3.5", arithmetic<Times, 2>, Of::Floats},
        {"fma", "9.7.3.6", arithmetic<TimesPlus, 3>, Of::Floats},
        {"mad", "9.7.3.7", arithmetic<TimesPlus, 3>, Of::Floats},
        {"div", "9.7.3.8", div, Of::Floats},
        {"abs", "9.7.3.9", abs<true>, Of::Floats},
        {"neg", "9.7.3.10", abs<false>, Of::Floats},
        {"min", "9.7.3.11", min<false>, Of::Floats},
        {"max", "9.7.3.12", min<true>, Of::Floats},
        {"rcp", "9.7.3.13", rcp, Of::Floats},
        {"sqrt", "9.7.3.15", sqrt, Of::Floats},
    };
}

}  // namespace ptx

// Conversions between two scalar types. PTX ISA 9.7.9.21; packed and narrow formats are in packed_conversion.cpp.
#include "floats.h"

namespace ptx {

namespace {

// ---- integers to integers: registers may be wider than the types
int64_t extended(uint64_t x, unsigned bits, bool is_signed) {
    uint64_t at_top = x << (64 - bits);
    return is_signed ? (int64_t)at_top >> (64 - bits) : (int64_t)(at_top >> (64 - bits));
}

// number: bits and sign of the source, then of the result.
template <class From, class To> Step integer_to_integer(Warp& warp, const Instruction& i, Mask active) {
    To* d = warp.values<To>(i.slot[0]);
    const From* a = warp.values<From>(i.slot[1]);
    unsigned from = i.number[0], to = i.number[2];
    bool from_signed = i.number[1], to_signed = i.number[3];
    each_lane(active, [&](unsigned lane) { d[lane] = extended(extended(a[lane], from, from_signed), to, to_signed); });
    return Step::Next;
}
template <class From, class To> Step saturated(Warp& warp, const Instruction& i, Mask active) {
    To* d = warp.values<To>(i.slot[0]);
    const From* a = warp.values<From>(i.slot[1]);
    unsigned to = i.number[2];
    bool to_signed = i.number[3];
    __int128 least = to_signed ? -((__int128)1 << (to - 1)) : 0;
    __int128 most = ((__int128)1 << (to_signed ? to - 1 : to)) - 1;
    each_lane(active, [&](unsigned lane) {
        int64_t bits = extended(a[lane], i.number[0], i.number[1]);
        __int128 value = i.number[1] ? (__int128)bits : (__int128)(uint64_t)bits;
        d[lane] = (To)(value < least ? least : value > most ? most : value);
    });
    return Step::Next;
}

template <class Make> Handler by_register(unsigned bytes, Make make) {
    return bytes == 2 ? make(Tag<uint16_t>{}) : bytes == 4 ? make(Tag<uint32_t>{}) : make(Tag<uint64_t>{});
}

void between_integers(Decoder& d, Type to, Type from, bool sat) {
    d.out.number = {from.bytes * 8, from.kind == Type::Signed, to.bytes * 8, to.kind == Type::Signed};
    d.out.run = by_register(d.out.slot[1].bytes, [&](auto source) {
        return by_register(d.out.slot[0].bytes, [&](auto result) -> Handler {
            using F = PTX_TYPE(source);
            using R = PTX_TYPE(result);
            return sat ? saturated<F, R> : integer_to_integer<F, R>;
        });
    });
}

// ---- floats as they lie in registers
struct AsF16 {
    using Bits = uint16_t;
    static float get(uint16_t bits) { return from_f16(bits); }
    static uint16_t nearest(float x) { return to_f16(x); }
    static uint16_t put(double x, Rounding rounding) { return FormatF16::encode(x, rounding); }
};
struct AsBF16 {
    using Bits = uint16_t;
    static float get(uint16_t bits) { return from_bf16(bits); }
    static uint16_t nearest(float x) { return to_bf16(x); }
    static uint16_t put(double x, Rounding rounding) { return FormatBF16::encode(x, rounding); }
};
template <class T> struct AsIs {                      // their roundings are those of the arithmetic unit
    using Bits = T;
    static T get(T x) { return x; }
    static T nearest(double x) { return canonical((T)x); }
    static T put(double x, Rounding) { return canonical((T)x); }
};
template <class Format> constexpr bool is_half = sizeof(typename Format::Bits) == 2;

template <class Make> Handler by_format(Decoder& d, Type type, Make make) {
    if (type.is(Type::Float, 2)) return make(Tag<AsF16>{});
    if (type.kind == Type::Brain) return make(Tag<AsBF16>{});
    if (type.is(Type::Float, 4)) return make(Tag<AsIs<float>>{});
    if (type.is(Type::Float, 8)) return make(Tag<AsIs<double>>{});
    d.unsupported("a type of cvt");
}
// What is common to conversions with integers. number: bits of the integer and whether it has a sign, then more.
struct Integer {
    unsigned bits;
    bool is_signed;
    explicit Integer(const Instruction& i) : bits(i.number[0]), is_signed(i.number[1]) {}
    static void decode(Decoder& d, Type type) {
        d.out.number[0] = type.bytes * 8, d.out.number[1] = type.kind == Type::Signed;
    }
};

// ---- integers to floats; number[2]: the rounding, [3]: .sat
// A 64-bit number with at most 53 bits; the last tells whether anything was lost.
double to_odd(int64_t x, bool is_signed) {
    bool negative = is_signed && x < 0;
    uint64_t magnitude = negative ? 0 - (uint64_t)x : (uint64_t)x;
    if (magnitude >> 53) magnitude = (magnitude >> 11 | ((magnitude & 2047) != 0)) << 11;
    return negative ? -(double)magnitude : (double)magnitude;
}

template <class Register, class Format> Step integer_to_float(Warp& warp, const Instruction& i, Mask active) {
    using Bits = typename Format::Bits;
    Bits* d = warp.values<Bits>(i.slot[0]);
    const Register* a = warp.values<Register>(i.slot[1]);
    Integer from(i);
    Rounding rounding = (Rounding)i.number[2];
    RoundTo mode(is_half<Format> ? Rounding::NearestEven : rounding);
    each_lane(active, [&](unsigned lane) {
        int64_t x = extended(a[lane], from.bits, from.is_signed);
        if constexpr (is_half<Format>) d[lane] = Format::put(to_odd(x, from.is_signed), rounding);
        else d[lane] = from.is_signed ? (Bits)x : (Bits)(uint64_t)x;
        if (i.number[3]) {
            auto whole = Format::get(d[lane]);
            d[lane] = Format::nearest(whole > 0 ? whole < 1 ? whole : 1 : 0);
        }
    });
    return Step::Next;
}

void integer_to_float(Decoder& d, Type to, Type from) {
    Integer::decode(d, from);
    d.out.run = by_register(d.out.slot[1].bytes, [&](auto width) {
        return by_format(d, to, [&](auto format) -> Handler {
            return integer_to_float<PTX_TYPE(width), PTX_TYPE(format)>;
        });
    });
}

// ---- floats to integers: rounded, then clamped; number[2]: the rounding, [3]: .ftz
double whole(double x, Rounding rounding) {
    switch (rounding) {
    case Rounding::Zero: return std::trunc(x);
    case Rounding::Down: return std::floor(x);
    case Rounding::Up: return std::ceil(x);
    default: return std::nearbyint(x);
    }
}

template <class Format, class Register> Step float_to_integer(Warp& warp, const Instruction& i, Mask active) {
    using Bits = typename Format::Bits;
    Register* d = warp.values<Register>(i.slot[0]);
    const Bits* a = warp.values<Bits>(i.slot[1]);
    Integer to(i);
    Rounding rounding = (Rounding)i.number[2];
    uint64_t first_bit = 1ull << (to.bits - 1), most = to.is_signed ? first_bit - 1 : 2 * first_bit - 1;
    uint64_t least = to.is_signed ? 0 - first_bit : 0;
    double past = (double)first_bit * (to.is_signed ? 1 : 2), below = to.is_signed ? -(double)first_bit : 0;
    // ISA: a NaN gives 0, or where either side has 64 bits the number whose first bit alone is set
    uint64_t from_nan = sizeof(Bits) == 8 || to.bits == 64 ? first_bit : 0;
    each_lane(active, [&](unsigned lane) {
        auto given = Format::get(a[lane]);
        if constexpr (sizeof(Bits) == 4) given = i.number[3] ? flush(given) : given;
        double x = whole(given, rounding);
        uint64_t bits = x != x ? from_nan : x >= past ? most : x <= below ? least
                        : to.is_signed ? (uint64_t)(int64_t)x : (uint64_t)x;
        d[lane] = (Register)extended(bits, to.bits, to.is_signed);
    });
    return Step::Next;
}

void float_to_integer(Decoder& d, Type to, Type from) {
    Integer::decode(d, to);
    d.out.run = by_format(d, from, [&](auto format) {
        return by_register(d.out.slot[0].bytes, [&](auto width) -> Handler {
            return float_to_integer<PTX_TYPE(format), PTX_TYPE(width)>;
        });
    });
}

// ---- floats to floats
constexpr int64_t Sat = 1, Flush = 2, Relu = 4, Whole = 8, Finite = 16;

template <class T> T adjusted(T x, int64_t how) {
    if (how & Sat) x = x > 0 ? x < 1 ? x : 1 : 0;
    if (how & Relu) x = x > 0 || x != x ? x : 0;
    return x;
}

template <class From, class To> Step widen_or_round(Warp& warp, const Instruction& i, Mask active) {
    auto* d = warp.values<typename To::Bits>(i.slot[0]);
    const auto* a = warp.values<typename From::Bits>(i.slot[1]);
    each_lane(active, [&](unsigned lane) { d[lane] = To::nearest(From::get(a[lane])); });
    return Step::Next;
}

template <class From, class To> Step float_to_float(Warp& warp, const Instruction& i, Mask active) {
    using Result = typename To::Bits;
    Result* d = warp.values<Result>(i.slot[0]);
    const auto* a = warp.values<typename From::Bits>(i.slot[1]);
    Rounding rounding = (Rounding)i.number[0];
    int64_t how = i.number[1];
    RoundTo mode(is_half<To> ? Rounding::NearestEven : rounding);
    each_lane(active, [&](unsigned lane) {
        auto x = From::get(a[lane]);
        if constexpr (sizeof(x) == 4) x = how & Flush ? flush(x) : x;
        if (how & Whole) x = whole(x, rounding);
        Result bits = To::put(adjusted(x, how), rounding);
        if constexpr (sizeof(Result) == 4) bits = how & Flush ? flush(bits) : bits;
        if constexpr (is_half<To>)
            if (how & Finite && To::get(bits) - To::get(bits) != 0 && x == x)
                bits = (bits & 0x8000) | (To::put(INFINITY, Rounding::Zero) - 1);
        d[lane] = bits;
    });
    return Step::Next;
}

}  // namespace

void scalar_cvt(Decoder& d) {
    std::string name = d.one_of({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"}, false);
    bool ftz = d.has("ftz"), sat = d.has("sat"), relu = d.has("relu"), finite = d.has("satfinite");
    Type to = d.type(), from = d.type();
    d.out.slot[0] = to.is_integer() ? d.loose(d.operand(0), to, true) : d.write(0, to);
    d.out.slot[1] = from.is_integer() ? d.loose(d.operand(1), from, false) : d.read(1, from);
    if ((relu || finite) && (to.is_integer() || from.is_integer() || to.bytes != 2)) d.unsupported();
    if (to.is_integer() && from.is_integer()) return between_integers(d, to, from, sat);
    if (to.is_integer() || from.is_integer()) {
        d.out.number[2] = (int64_t)rounding_of(name);
        d.out.number[3] = to.is_integer() ? ftz : sat;
        return to.is_integer() ? float_to_integer(d, to, from) : integer_to_float(d, to, from);
    }
    d.out.number[0] = (int64_t)rounding_of(name);
    bool to_whole = name.size() == 3 && name != "rna";
    d.out.number[1] = Sat * sat | Flush * ftz | Relu * relu | Whole * to_whole | Finite * finite;
    bool plain = d.out.number[0] == (int64_t)Rounding::NearestEven && d.out.number[1] == 0;
    d.out.run = by_format(d, from, [&](auto source) {
        return by_format(d, to, [&](auto result) -> Handler {
            using From = PTX_TYPE(source);
            using To = PTX_TYPE(result);
            // f64 to a half would be rounded twice on the way through float
            if constexpr (!(is_half<To> && sizeof(typename From::Bits) == 8))
                if (plain) return widen_or_round<From, To>;
            return float_to_float<From, To>;
        });
    });
}

}  // namespace ptx

// Logic, shifts and bit fields. PTX ISA 9.7.1 (bit fields), 9.7.8 (logic and shifts) and 9.7.9.7 (prmt).
#include "pick.h"

namespace ptx {

namespace {

template <class T> T both(T a, T b) { return a & b; }
template <class T> T either(T a, T b) { return a | b; }
template <class T> T differ(T a, T b) { return a ^ b; }
template <class T> T inverted(T a) { return ~a; }
template <class T> T is_zero(T a) { return a == 0; }

Step predicate_logic(Warp& warp, const Instruction& i, Mask active) {
    Mask a = warp.predicate(i.slot[1]), b = i.slot[2] ? warp.predicate(i.slot[2]) : 0;
    Mask result = i.number[0] == '&' ? a & b : i.number[0] == '|' ? a | b : i.number[0] == '^' ? a ^ b : ~a;
    warp.set_predicate(i.slot[0], result, active);
    return Step::Next;
}

template <char operation> void logic(Decoder& d) {
    constexpr unsigned reads = operation == '~' || operation == '0' ? 1 : 2;
    Type type = d.type();
    same_type(d, type, reads);
    if (type.kind == Type::Predicate) {
        if (operation == '0') d.unsupported();
        d.out.number[0] = operation;
        d.out.run = predicate_logic;
        return;
    }
    d.out.run = by_unsigned(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        switch (operation) {
        case '&': return binary<T, T, both<T>>;
        case '|': return binary<T, T, either<T>>;
        case '^': return binary<T, T, differ<T>>;
        case '~': return unary<T, T, inverted<T>>;
        default: return unary<T, T, is_zero<T>>;
        }
    });
}

// ---- lop3: any function of three bits, given by its table
uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, unsigned table) {
    uint32_t result = 0;
    for (unsigned row = 0; row < 8; row++) {
        uint32_t here = (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
        result |= table >> row & 1 ? here : 0;
    }
    return result;
}

Step lop3_run(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* d = warp.values<uint32_t>(i.slot[0]);
    const uint32_t *a = warp.values<uint32_t>(i.slot[1]), *b = warp.values<uint32_t>(i.slot[2]);
    const uint32_t* c = warp.values<uint32_t>(i.slot[3]);
    unsigned table = i.number[0];
    Mask any = 0;
    each_lane(active, [&](unsigned lane) {
        d[lane] = look_up(a[lane], b[lane], c[lane], table);
        any |= (Mask)(d[lane] != 0) << lane;
    });
    if (i.slot[4]) {
        Mask q = warp.predicate(i.slot[5]);
        warp.set_predicate(i.slot[4], i.number[1] == '&' ? any & q : i.number[1] == '|' ? any | q : any ^ q, active);
    }
    return Step::Next;
}

void lop3(Decoder& d) {
    std::string with = d.one_of({"and", "or", "xor"}, false);
    d.type();
    const Operand& to = d.operand(0);
    if (!with.empty()) {
        if (to.kind != Operand::Pair) d.unsupported("d|p was expected");
        d.out.slot[4] = d.write(to.parts[1], PRED);
        d.out.slot[5] = d.read(5, PRED);
        d.out.number[1] = with == "and" ? '&' : with == "or" ? '|' : '^';
    }
    d.out.slot[0] = d.write(with.empty() ? to : to.parts[0], B32);
    for (unsigned k = 1; k <= 3; k++) d.out.slot[k] = d.read(k, B32);
    d.out.number[0] = d.integer(4);
    d.out.run = lop3_run;
}

// ---- shifts: a distance past the width shifts everything out
template <class T> T left(T a, uint32_t b) { return b >= 8 * sizeof(T) ? 0 : (T)(a << b); }
template <class T> T right(T a, uint32_t b) {
    constexpr uint32_t width = 8 * sizeof(T);
    if (std::is_signed_v<T>) return a >> (b >= width ? width - 1 : b);
    return b >= width ? 0 : a >> b;
}

template <bool to_left> void shift(Decoder& d) {
    Type type = d.type();
    d.out.slot[0] = d.write(0, type);
    d.out.slot[1] = d.read(1, type);
    d.out.slot[2] = d.read(2, U32);
    d.out.run = by_integer(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return mixed<T, T, uint32_t, to_left ? left<T> : right<T>>;
    });
}

template <bool to_left, bool wrap> uint32_t funnel(uint32_t low, uint32_t high, uint32_t distance) {
    uint32_t n = wrap ? distance & 31 : distance > 32 ? 32 : distance;
    uint64_t both = (uint64_t)high << 32 | low;
    return to_left ? both << n >> 32 : both >> n;
}

void shf(Decoder& d) {
    bool left = d.one_of({"l", "r"}) == "l", wrap = d.one_of({"wrap", "clamp"}) == "wrap";
    d.type();
    same_type(d, B32, 3);
    using V = uint32_t;
    d.out.run = left ? wrap ? ternary<V, V, funnel<true, true>> : ternary<V, V, funnel<true, false>>
                     : wrap ? ternary<V, V, funnel<false, true>> : ternary<V, V, funnel<false, false>>;
}

// ---- bit fields
template <class T> T extracted(T a, uint32_t from, uint32_t length) {
    constexpr uint32_t width = 8 * sizeof(T);
    using U = std::make_unsigned_t<T>;
    from &= 255, length &= 255;
    bool negative = std::is_signed_v<T> && length != 0 &&
                    (a >> (from + length - 1 < width - 1 ? from + length - 1 : width - 1) & 1);
    U field = from >= width ? 0 : (U)a >> from;
    U inside = length >= width ? (U)-1 : ((U)1 << length) - 1;
    if (from + length > width && from < width) inside = ((U)-1 >> from) & inside;
    if (from >= width) inside = 0;
    return (T)(negative ? (field & inside) | ~inside : field & inside);
}
template <class T> T inserted(T field, T into, uint32_t at, uint32_t length) {
    constexpr uint32_t width = 8 * sizeof(T);
    at &= 255, length &= 255;
    if (at >= width) return into;
    T inside = (length >= width ? (T)-1 : ((T)1 << length) - 1) << at;
    return (into & ~inside) | (field << at & inside);
}

template <class T> Step extract(Warp& warp, const Instruction& i, Mask active) {
    T* d = warp.values<T>(i.slot[0]);
    const T* a = warp.values<T>(i.slot[1]);
    const uint32_t *b = warp.values<uint32_t>(i.slot[2]), *c = warp.values<uint32_t>(i.slot[3]);
    each_lane(active, [&](unsigned lane) { d[lane] = extracted<T>(a[lane], b[lane], c[lane]); });
    return Step::Next;
}
template <class T> Step insert(Warp& warp, const Instruction& i, Mask active) {
    T* f = warp.values<T>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]);
    const uint32_t *c = warp.values<uint32_t>(i.slot[3]), *d = warp.values<uint32_t>(i.slot[4]);
    each_lane(active, [&](unsigned lane) { f[lane] = inserted<T>(a[lane], b[lane], c[lane], d[lane]); });
    return Step::Next;
}

template <bool into> void bit_field(Decoder& d) {
    Type type = d.type();
    unsigned numbers = into ? 3 : 2;
    same_type(d, type, into ? 2 : 1);
    d.out.slot[numbers] = d.read(numbers, U32);
    d.out.slot[numbers + 1] = d.read(numbers + 1, U32);
    if (type.bytes < 4) d.unsupported("32 or 64 bits were expected");
    bool is_signed = type.kind == Type::Signed, narrow = type.bytes == 4;
    if (into) d.out.run = narrow ? insert<uint32_t> : insert<uint64_t>;
    else d.out.run = narrow ? is_signed ? extract<int32_t> : extract<uint32_t>
                            : is_signed ? extract<int64_t> : extract<uint64_t>;
}

template <bool wrap> uint32_t ones(uint32_t at, uint32_t length) {
    if (wrap) at &= 31, length &= 31;
    uint32_t run = length >= 32 ? ~0u : (1u << length) - 1;
    return at >= 32 ? 0 : run << at;
}
template <class T, bool wrap> T extended(T a, uint32_t length) {
    uint32_t n = wrap ? length & 31 : length;
    if (n >= 32) return a;
    if (n == 0) return 0;
    return (T)((T)((uint32_t)a << (32 - n)) >> (32 - n));
}

void bmsk(Decoder& d) {
    bool wrap = d.one_of({"wrap", "clamp"}) == "wrap";
    d.type();
    same_type(d, B32, 2);
    d.out.run = wrap ? binary<uint32_t, uint32_t, ones<true>> : binary<uint32_t, uint32_t, ones<false>>;
}

void szext(Decoder& d) {
    bool wrap = d.one_of({"wrap", "clamp"}) == "wrap", is_signed = d.type().kind == Type::Signed;
    same_type(d, B32, 2);
    using U = uint32_t;
    using S = int32_t;
    d.out.run = is_signed ? wrap ? mixed<S, S, U, extended<S, true>> : mixed<S, S, U, extended<S, false>>
                          : wrap ? mixed<U, U, U, extended<U, true>> : mixed<U, U, U, extended<U, false>>;
}

// ---- counting and finding
template <class T> uint32_t population(T a) { return __builtin_popcountll(a); }
template <class T> uint32_t leading_zeros(T a) { return a ? __builtin_clzll(a) - (64 - 8 * sizeof(T)) : 8 * sizeof(T); }
template <class T> T reversed(T a) {
    uint64_t x = a;
    x = (x >> 1 & 0x5555555555555555) | (x & 0x5555555555555555) << 1;
    x = (x >> 2 & 0x3333333333333333) | (x & 0x3333333333333333) << 2;
    x = (x >> 4 & 0x0F0F0F0F0F0F0F0F) | (x & 0x0F0F0F0F0F0F0F0F) << 4;
    return __builtin_bswap64(x) >> (64 - 8 * sizeof(T));
}
// The most significant bit that is not the sign's; -1: there is none.
template <class T, bool as_distance> uint32_t found(T a) {
    using U = std::make_unsigned_t<T>;
    uint32_t zeros = leading_zeros<U>(a < 0 ? ~a : a);
    if (zeros == 8 * sizeof(T)) return ~0u;
    return as_distance ? zeros : 8 * sizeof(T) - 1 - zeros;
}

enum class Count { Ones, LeadingZeros };

template <Count what> void count(Decoder& d) {
    Type type = d.type();
    if (type.bytes < 4) d.unsupported("32 or 64 bits were expected");
    d.out.slot[0] = d.write(0, U32);
    d.out.slot[1] = d.read(1, type);
    d.out.run = by_unsigned(d, type, [](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return what == Count::Ones ? unary<T, uint32_t, population<T>> : unary<T, uint32_t, leading_zeros<T>>;
    });
}

void bfind(Decoder& d) {
    bool distance = d.has("shiftamt");
    Type type = d.type();
    d.out.slot[0] = d.write(0, U32);
    d.out.slot[1] = d.read(1, type);
    d.out.run = by_integer(d, type, [&](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        return distance ? unary<T, uint32_t, found<T, true>> : unary<T, uint32_t, found<T, false>>;
    });
}

void brev(Decoder& d) {
    Type type = d.type();
    same_type(d, type, 1);
    d.out.run = type.bytes == 8 ? unary<uint64_t, uint64_t, reversed> : unary<uint32_t, uint32_t, reversed>;
}

// The n-th bit that is set, counted from `base`; upwards, downwards where n < 0, `base` itself for 0.
uint32_t nth_set(uint32_t mask, uint32_t base, uint32_t offset) {
    int32_t n = offset;
    if (n == 0) return base < 32 && mask >> base & 1 ? base : ~0u;
    int step = n > 0 ? 1 : -1, left = n > 0 ? n : -n;
    for (int64_t at = base; at >= 0 && at < 32; at += step)
        if (mask >> at & 1 && --left == 0) return at;
    return ~0u;
}

void fns(Decoder& d) {
    d.type();
    same_type(d, B32, 3);
    d.out.run = ternary<uint32_t, uint32_t, nth_set>;
}

// ---- prmt: bytes of two registers by number
uint32_t selected_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t all = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (unsigned k = 0; k < 4; k++) {
        uint32_t which = selector >> 4 * k, byte = all >> (which & 7) * 8 & 255;
        uint32_t sign = byte & 128 ? 255 : 0;
        result |= (which & 8 ? sign : byte) << 8 * k;
    }
    return result;
}
// The special modes: which four bytes the number n in 0..3 selects, as a selector of the general mode.
constexpr uint16_t SELECTORS[6][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543},                 // f4e
    {0x5670, 0x6701, 0x7012, 0x0123},                 // b4e
    {0x0000, 0x1111, 0x2222, 0x3333},                 // rc8
    {0x3210, 0x3211, 0x3222, 0x3333},                 // ecl
    {0x0000, 0x1110, 0x2210, 0x3210},                 // ecr
    {0x1010, 0x3232, 0x1010, 0x3232},                 // rc16
};
template <int mode> uint32_t by_mode(uint32_t a, uint32_t b, uint32_t selector) {
    return selected_bytes(a, b, SELECTORS[mode][selector & 3]);
}

void prmt(Decoder& d) {
    std::string mode = d.one_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, false);
    d.type();
    same_type(d, B32, 3);
    using V = uint32_t;
    d.out.run = mode.empty() ? ternary<V, V, selected_bytes>
                : mode == "f4e" ? ternary<V, V, by_mode<0>> : mode == "b4e" ? ternary<V, V, by_mode<1>>
                : mode == "rc8" ? ternary<V, V, by_mode<2>> : mode == "ecl" ? ternary<V, V, by_mode<3>>
                : mode == "ecr" ? ternary<V, V, by_mode<4>> : ternary<V, V, by_mode<5>>;
}

}  // namespace

Table logic_instructions() {
    return {
        {"popc", "9.7.1.14", count<Count::Ones>},
        {"clz", "9.7.1.15", count<Count::LeadingZeros>},
        {"bfind", "9.7.1.16", bfind},
        {"fns", "9.7.1.17", fns},
        {"brev", "9.7.1.18", brev},
        {"bfe", "9.7.1.19", bit_field<false>},
        {"bfi", "9.7.1.20", bit_field<true>},
        {"szext", "9.7.1.21", szext},
        {"bmsk", "9.7.1.22", bmsk},
        {"and", "9.7.8.1", logic<'&'>},
        {"or", "9.7.8.2", logic<'|'>},
        {"xor", "9.7.8.3", logic<'^'>},
        {"not", "9.7.8.4", logic<'~'>},
        {"cnot", "9.7.8.5", logic<'0'>},
        {"lop3", "9.7.8.6", lop3},
        {"shf", "9.7.8.7", shf},
        {"shl", "9.7.8.8", shift<true>},
        {"shr", "9.7.8.9", shift<false>},
        {"prmt", "9.7.9.7", prmt},
    };
}

}  // namespace ptx

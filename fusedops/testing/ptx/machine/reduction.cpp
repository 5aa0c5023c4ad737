// The element-wise reductions of bulk copies. PTX ISA 9.7.9.25.4.2.
#include <algorithm>
#include <cstring>

#include "bulk.h"
#include "numbers.h"

namespace ptx {

namespace {

template <class T, T (*join)(T, T)> void each(uint8_t* to, const uint8_t* from, unsigned bytes) {
    for (unsigned k = 0; k + sizeof(T) <= bytes; k += sizeof(T)) {
        T a, b;
        memcpy(&a, to + k, sizeof(T)), memcpy(&b, from + k, sizeof(T));
        a = join(a, b);
        memcpy(to + k, &a, sizeof(T));
    }
}

template <class T> T plus(T a, T b) { return a + b; }
template <class T> T least(T a, T b) { return std::min(a, b); }
template <class T> T most(T a, T b) { return std::max(a, b); }
template <class T> T both(T a, T b) { return a & b; }
template <class T> T either(T a, T b) { return a | b; }
template <class T> T odd(T a, T b) { return a ^ b; }
uint32_t up(uint32_t a, uint32_t b) { return a >= b ? 0 : a + 1; }
uint32_t down(uint32_t a, uint32_t b) { return a == 0 || a > b ? b : a - 1; }

template <float (*read)(uint16_t), uint16_t (*write)(float), bool add, bool maximum>
uint16_t narrow(uint16_t a, uint16_t b) {
    float x = read(a), y = read(b);
    if (add) return write(x + y);
    if (x != x || y != y) return write(x != x ? y : x);
    if (x == y) return maximum ? a & b : a | b;       // -0 is less than +0
    return (x < y) == maximum ? b : a;
}

template <float (*read)(uint16_t), uint16_t (*write)(float)> Combine half(Reduce reduce) {
    if (reduce == Reduce::Add) return each<uint16_t, narrow<read, write, true, false>>;
    if (reduce == Reduce::Min) return each<uint16_t, narrow<read, write, false, false>>;
    return reduce == Reduce::Max ? each<uint16_t, narrow<read, write, false, true>> : nullptr;
}

template <class T> Combine bits(Reduce reduce) {
    return reduce == Reduce::And ? each<T, both<T>> : reduce == Reduce::Or ? each<T, either<T>>
           : reduce == Reduce::Xor ? each<T, odd<T>> : nullptr;
}

template <class T> Combine ordered(Reduce reduce) {
    return reduce == Reduce::Min ? each<T, least<T>> : reduce == Reduce::Max ? each<T, most<T>> : nullptr;
}

template <class U, class T> Combine integer(Reduce reduce) {      // sums wrap, so they are those of unsigned numbers
    if (reduce == Reduce::Add) return each<U, plus<U>>;
    if (reduce == Reduce::Min || reduce == Reduce::Max) return ordered<T>(reduce);
    return bits<U>(reduce);
}

}  // namespace

Combine combiner(Reduce reduce, Element element) {
    if (reduce == Reduce::None) return nullptr;
    switch (element) {
    case Element::U32:
        if (reduce == Reduce::Inc) return each<uint32_t, up>;
        if (reduce == Reduce::Dec) return each<uint32_t, down>;
        return integer<uint32_t, uint32_t>(reduce);
    case Element::S32: return integer<uint32_t, int32_t>(reduce);
    case Element::U64: return integer<uint64_t, uint64_t>(reduce);
    case Element::S64: return integer<uint64_t, int64_t>(reduce);
    case Element::F32: return reduce == Reduce::Add ? each<float, plus<float>> : nullptr;
    case Element::F64: return reduce == Reduce::Add ? each<double, plus<double>> : nullptr;
    case Element::F16: return half<from_f16, to_f16>(reduce);
    case Element::BF16: return half<from_bf16, to_bf16>(reduce);
    default: return nullptr;
    }
}

Reduce reduction_named(const std::string& name) {
    const char* names[] = {"", "add", "min", "max", "inc", "dec", "and", "or", "xor"};
    for (int k = 0; k < 9; k++)
        if (name == names[k]) return (Reduce)k;
    throw Fault("unknown reduction ." + name);
}

Element element_named(const std::string& name) {
    const std::pair<const char*, Element> names[] = {
        {"b32", Element::U32}, {"u32", Element::U32}, {"s32", Element::S32}, {"b64", Element::U64},
        {"u64", Element::U64}, {"s64", Element::S64}, {"f16", Element::F16}, {"bf16", Element::BF16},
        {"f32", Element::F32}, {"f64", Element::F64},
    };
    for (auto& [known, element] : names)
        if (name == known) return element;
    throw Fault("no reduction of type ." + name);
}

}  // namespace ptx

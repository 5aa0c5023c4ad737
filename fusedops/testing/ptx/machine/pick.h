// From a type named in the PTX to the C++ type that a handler is made for.
#pragma once
#include "decoder.h"
#include "warp.h"

namespace ptx {

template <class T> struct Tag {
    using type = T;
};

// Each calls make(Tag<T>{}) with the type that fits and returns what it gives.
template <class Make> Handler by_unsigned(Decoder& decoder, Type type, Make make) {   // signs do not matter
    switch (type.is_integer() ? type.bytes : 0) {
    case 2: return make(Tag<uint16_t>{});
    case 4: return make(Tag<uint32_t>{});
    case 8: return make(Tag<uint64_t>{});
    default: decoder.unsupported("an integer type was expected");
    }
}
template <class Make> Handler by_integer(Decoder& decoder, Type type, Make make) {
    if (type.kind != Type::Signed) return by_unsigned(decoder, type, make);
    switch (type.bytes) {
    case 2: return make(Tag<int16_t>{});
    case 4: return make(Tag<int32_t>{});
    case 8: return make(Tag<int64_t>{});
    default: decoder.unsupported("an integer type was expected");
    }
}
template <class Make> Handler by_float(Decoder& decoder, Type type, Make make) {
    if (type.is(Type::Float, 4)) return make(Tag<float>{});
    if (type.is(Type::Float, 8)) return make(Tag<double>{});
    decoder.unsupported("f32 or f64 was expected");
}
template <class Make> Handler by_flag(bool flag, Make make) {
    return flag ? make(std::true_type{}) : make(std::false_type{});
}
#define PTX_TYPE(tag) typename decltype(tag)::type

// Handlers of operations that look at one lane at a time: d = f(a), f(a, b), f(a, b, c).
template <class T, class R, R (*f)(T)> Step unary(Warp& warp, const Instruction& i, Mask active) {
    R* d = warp.values<R>(i.slot[0]);
    const T* a = warp.values<T>(i.slot[1]);
    each_lane(active, [&](unsigned lane) { d[lane] = f(a[lane]); });
    return Step::Next;
}
template <class T, class R, R (*f)(T, T)> Step binary(Warp& warp, const Instruction& i, Mask active) {
    R* d = warp.values<R>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]);
    each_lane(active, [&](unsigned lane) { d[lane] = f(a[lane], b[lane]); });
    return Step::Next;
}
template <class T, class R, R (*f)(T, T, T)> Step ternary(Warp& warp, const Instruction& i, Mask active) {
    R* d = warp.values<R>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]), *c = warp.values<T>(i.slot[3]);
    each_lane(active, [&](unsigned lane) { d[lane] = f(a[lane], b[lane], c[lane]); });
    return Step::Next;
}
// d = f(a, b) with operands of different types, such as a shift's.
template <class R, class A, class B, R (*f)(A, B)> Step mixed(Warp& warp, const Instruction& i, Mask active) {
    R* d = warp.values<R>(i.slot[0]);
    const A* a = warp.values<A>(i.slot[1]);
    const B* b = warp.values<B>(i.slot[2]);
    each_lane(active, [&](unsigned lane) { d[lane] = f(a[lane], b[lane]); });
    return Step::Next;
}
// The operands of those: slot[0] is written, the others are read, all of one type.
inline void same_type(Decoder& decoder, Type type, unsigned reads) {
    decoder.out.slot[0] = decoder.write(0, type);
    for (unsigned k = 1; k <= reads; k++) decoder.out.slot[k] = decoder.read(k, type);
}

}  // namespace ptx

// Extended-precision arithmetic: sums and products with a carry. PTX ISA 9.7.2.
#include "pick.h"

namespace ptx {

namespace {

struct Carry {
    Mask set = 0;                                     // CC.CF of each lane
};

struct Modes {                                        // of an instruction
    bool reads, writes;
    explicit Modes(const Instruction& i) : reads(i.number[0]), writes(i.number[1]) {}
};

template <class T> struct Sum {
    static T of(T a, T b, bool in, bool& out) {
        T sum = a + b, all = sum + in;
        out = sum < a || all < sum;
        return all;
    }
};
template <class T> struct Difference {                // the flag is the borrow
    static T of(T a, T b, bool in, bool& out) {
        out = a < b || (a == b && in);
        return a - b - in;
    }
};

template <class T, class Operation> Step with_carry(Warp& warp, const Instruction& i, Mask active) {
    T* d = warp.values<T>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]);
    Carry& carry = warp.states.get<Carry>();
    Modes modes(i);
    Mask in = modes.reads ? carry.set : 0, out = 0;
    each_lane(active, [&](unsigned lane) {
        bool past;
        d[lane] = Operation::of(a[lane], b[lane], in >> lane & 1, past);
        out |= (Mask)past << lane;
    });
    if (modes.writes) carry.set = (carry.set & ~active) | out;
    return Step::Next;
}

template <class T, bool high> T product(T a, T b) {
    using Wide = std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                    std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>;
    return high ? (T)((Wide)a * b >> 8 * sizeof(T)) : (T)((std::make_unsigned_t<T>)a * (std::make_unsigned_t<T>)b);
}

template <class T, bool high> Step multiply_with_carry(Warp& warp, const Instruction& i, Mask active) {
    using U = std::make_unsigned_t<T>;
    T* d = warp.values<T>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]), *c = warp.values<T>(i.slot[3]);
    Carry& carry = warp.states.get<Carry>();
    Modes modes(i);
    Mask in = modes.reads ? carry.set : 0, out = 0;
    each_lane(active, [&](unsigned lane) {
        bool past;
        d[lane] = Sum<U>::of(product<T, high>(a[lane], b[lane]), c[lane], in >> lane & 1, past);
        out |= (Mask)past << lane;
    });
    if (modes.writes) carry.set = (carry.set & ~active) | out;
    return Step::Next;
}

// add.cc writes the flag; addc reads it, and writes it only with .cc.
template <template <class> class Operation, bool reads> void sum(Decoder& d) {
    d.out.number[0] = reads, d.out.number[1] = !reads || d.has("cc");
    Type type = d.type();
    if (type.bytes < 4) d.unsupported("32 or 64 bits were expected");
    same_type(d, type, 2);
    d.out.run = type.bytes == 4 ? with_carry<uint32_t, Operation<uint32_t>> : with_carry<uint64_t, Operation<uint64_t>>;
}

template <bool reads> void mad(Decoder& d) {
    d.out.number[0] = reads, d.out.number[1] = !reads || d.has("cc");
    bool high = d.statement.name[1] == "hi";
    Type type = d.type();
    if (type.bytes < 4) d.unsupported("32 or 64 bits were expected");
    same_type(d, type, 3);
    bool is_signed = type.kind == Type::Signed, narrow = type.bytes == 4;
    if (!high) d.out.run = narrow ? multiply_with_carry<uint32_t, false> : multiply_with_carry<uint64_t, false>;
    else if (is_signed) d.out.run = narrow ? multiply_with_carry<int32_t, true> : multiply_with_carry<int64_t, true>;
    else d.out.run = narrow ? multiply_with_carry<uint32_t, true> : multiply_with_carry<uint64_t, true>;
}

}  // namespace

Table carry_instructions() {
    return {
        {"add.cc", "9.7.2.1", sum<Sum, false>},
        {"addc", "9.7.2.2", sum<Sum, true>},
        {"sub.cc", "9.7.2.3", sum<Difference, false>},
        {"subc", "9.7.2.4", sum<Difference, true>},
        {"mad.lo.cc", "9.7.2.5", mad<false>},
        {"mad.hi.cc", "9.7.2.5", mad<false>},
        {"madc.lo", "9.7.2.6", mad<true>},
        {"madc.hi", "9.7.2.6", mad<true>},
    };
}

}  // namespace ptx

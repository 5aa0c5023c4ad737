// Comparison and selection. PTX ISA 9.7.6, and 9.7.7 for halves.
#include <map>

#include "floats.h"

namespace ptx {

namespace {

// A comparison that ends in u also holds where a number is a NaN.
enum Comparison { Eq, Equ, Ne, Neu, Lt, Ltu, Le, Leu, Gt, Gtu, Ge, Geu, Num, Nan };

template <Comparison what, class T> bool holds(T a, T b) {
    switch (what) {
    case Eq: return a == b;
    case Equ: return !(a < b) && !(a > b);
    case Ne: return a < b || a > b;
    case Neu: return a != b;
    case Lt: return a < b;
    case Ltu: return !(a >= b);
    case Le: return a <= b;
    case Leu: return !(a > b);
    case Gt: return a > b;
    case Gtu: return !(a <= b);
    case Ge: return a >= b;
    case Geu: return !(a < b);
    case Num: return a == a && b == b;
    case Nan: return a != a || b != b;
    }
}

using Compare = Mask (*)(const void* a, const void* b, Mask active);

template <class T, Comparison what> Mask compare(const void* left, const void* right, Mask active) {
    const T *a = (const T*)left, *b = (const T*)right;
    Mask result = 0;
    each_lane(active, [&](unsigned lane) { result |= (Mask)holds<what>(a[lane], b[lane]) << lane; });
    return result;
}

template <class T> Compare comparison_named(Decoder& d, const std::string& name) {
    static const std::map<std::string, Compare> common = {
        {"eq", compare<T, Eq>}, {"lt", compare<T, Lt>}, {"le", compare<T, Le>},
        {"gt", compare<T, Gt>}, {"ge", compare<T, Ge>}, {"ne", compare<T, std::is_integral_v<T> ? Neu : Ne>},
    };
    auto found = common.find(name);
    if (found != common.end()) return found->second;
    if constexpr (!std::is_integral_v<T>) {
        static const std::map<std::string, Compare> of_floats = {
            {"equ", compare<T, Equ>}, {"neu", compare<T, Neu>}, {"ltu", compare<T, Ltu>}, {"leu", compare<T, Leu>},
            {"gtu", compare<T, Gtu>}, {"geu", compare<T, Geu>}, {"num", compare<T, Num>}, {"nan", compare<T, Nan>},
        };
        found = of_floats.find(name);
        if (found != of_floats.end()) return found->second;
    }
    d.unsupported("." + name);
}

// Halves are compared as floats, and .ftz takes subnormal numbers for zeros. `half`: the upper one of pairs.
using Prepare = void (*)(const void* from, unsigned half, float* to);

void flush_floats(const void* from, unsigned, float* to) {
    for (unsigned lane = 0; lane < LANES; lane++) to[lane] = flush(((const float*)from)[lane]);
}
template <unsigned step, bool ftz> void widen_f16(const void* from, unsigned half, float* to) {
    for (unsigned lane = 0; lane < LANES; lane++) {
        uint16_t bits = ((const uint16_t*)from)[lane * step + half];
        to[lane] = from_f16(ftz && !(bits & 0x7C00) ? 0 : bits);
    }
}
template <unsigned step> void widen_bf16(const void* from, unsigned half, float* to) {
    for (unsigned lane = 0; lane < LANES; lane++) to[lane] = from_bf16(((const uint16_t*)from)[lane * step + half]);
}

// What setp and set have in common. number[0]: '&', '|', '^' or 0; [1]: the Compare; [2]: the Prepare or 0.
struct Relation {
    std::string compare, combine;                     // "lt", and "and" or ""
    bool flush;
    Type type;                                        // of what is compared
};

bool is_pair(Type type) { return type.kind == Type::FloatPair || type.kind == Type::BrainPair; }

Prepare preparation(const Relation& relation) {
    Type type = relation.type;
    if (type.is(Type::Float, 4)) return relation.flush ? flush_floats : nullptr;
    if (type.is(Type::Float, 2)) return relation.flush ? widen_f16<1, true> : widen_f16<1, false>;
    if (type.kind == Type::FloatPair) return relation.flush ? widen_f16<2, true> : widen_f16<2, false>;
    if (type.kind == Type::Brain) return widen_bf16<1>;
    return type.kind == Type::BrainPair ? widen_bf16<2> : nullptr;
}

Compare comparison_of(Decoder& d, const Relation& relation) {
    const std::string& name = relation.compare;
    Type type = relation.type;
    if (type.is(Type::Float, 8)) return comparison_named<double>(d, name);
    if (type.kind == Type::Float || type.is_half()) return comparison_named<float>(d, name);
    bool as_unsigned = name == "lo" || name == "ls" || name == "hi" || name == "hs";
    if (as_unsigned && type.kind == Type::Signed) d.unsupported("." + name);
    std::string plain = !as_unsigned ? name : name == "lo" ? "lt" : name == "ls" ? "le" : name == "hi" ? "gt" : "ge";
    Compare chosen = nullptr;
    by_integer(d, type, [&](auto tag) -> Handler {
        chosen = comparison_named<PTX_TYPE(tag)>(d, plain);
        return nullptr;
    });
    return chosen;
}

Relation relation_of(Decoder& d) {
    Relation relation;
    relation.compare = d.next();
    relation.combine = d.one_of({"and", "or", "xor"}, false);
    relation.flush = d.has("ftz");
    return relation;
}

void operands_of(Decoder& d, const Relation& relation) {
    d.out.slot[1] = d.read(1, relation.type);
    d.out.slot[2] = d.read(2, relation.type);
    const std::string& combine = relation.combine;
    d.out.number[0] = combine == "and" ? '&' : combine == "or" ? '|' : combine == "xor" ? '^' : 0;
    if (d.out.number[0]) d.out.slot[3] = d.read(3, PRED);
    d.out.number[1] = (int64_t)comparison_of(d, relation);
    d.out.number[2] = (int64_t)preparation(relation);
}

Mask related(Warp& warp, const Instruction& i, Mask active, unsigned half) {
    auto compare = (Compare)i.number[1];
    const void *a = warp.values<uint8_t>(i.slot[1]), *b = warp.values<uint8_t>(i.slot[2]);
    if (!i.number[2]) return compare(a, b, active);
    float left[LANES], right[LANES];
    auto prepare = (Prepare)i.number[2];
    prepare(a, half, left), prepare(b, half, right);
    return compare(left, right, active);
}

Mask combined(Warp& warp, const Instruction& i, Mask result) {
    switch (i.number[0]) {
    case '&': return result & warp.predicate(i.slot[3]);
    case '|': return result | warp.predicate(i.slot[3]);
    case '^': return result ^ warp.predicate(i.slot[3]);
    default: return result;
    }
}

// ---- setp p|q: q is the result for the upper half of pairs, else the opposite; number[3]: pairs
Step set_predicate(Warp& warp, const Instruction& i, Mask active) {
    Mask first = related(warp, i, active, 0);
    if (i.slot[4]) {
        Mask second = i.number[3] ? related(warp, i, active, 1) : ~first;
        warp.set_predicate(i.slot[4], combined(warp, i, second), active);
    }
    warp.set_predicate(i.slot[0], combined(warp, i, first), active);
    return Step::Next;
}

void setp(Decoder& d) {
    Relation relation = relation_of(d);
    relation.type = d.type();
    operands_of(d, relation);
    const Operand& to = d.operand(0);
    d.out.slot[0] = d.write(to.kind == Operand::Pair ? to.parts[0] : to, PRED);
    if (to.kind == Operand::Pair) d.out.slot[4] = d.write(to.parts[1], PRED);
    d.out.number[3] = is_pair(relation.type);
    d.out.run = set_predicate;
}

// ---- set: all ones, or 1.0, where it holds; number[3] holds those bits, number[4]: pairs
Step set_value(Warp& warp, const Instruction& i, Mask active) {
    Mask first = combined(warp, i, related(warp, i, active, 0));
    Mask second = i.number[4] ? combined(warp, i, related(warp, i, active, 1)) : 0;
    uint64_t yes = i.number[3];
    each_lane(active, [&](unsigned lane) {
        uint64_t low = first >> lane & 1 ? yes : 0, high = second >> lane & 1 ? yes << 16 : 0;
        warp.set(i.slot[0], lane, low | high);
    });
    return Step::Next;
}

void set(Decoder& d) {
    Relation relation = relation_of(d);
    Type result = d.type();
    relation.type = d.type();
    operands_of(d, relation);
    bool pairs = is_pair(relation.type);
    if (is_pair(result) && !pairs) d.unsupported("pairs come from pairs");
    d.out.slot[0] = d.write(0, result);
    switch (result.kind) {
    case Type::Float: d.out.number[3] = result.bytes == 4 ? 0x3F800000 : 0x3C00; break;
    case Type::FloatPair: d.out.number[3] = 0x3C00; break;
    case Type::Brain: case Type::BrainPair: d.out.number[3] = 0x3F80; break;
    default: d.out.number[3] = pairs ? 0xFFFF : -1;
    }
    d.out.number[4] = pairs;
    d.out.run = set_value;
}

// ---- selp, slct
template <class T> Step select(Warp& warp, const Instruction& i, Mask active) {
    T* d = warp.values<T>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]);
    Mask first = warp.predicate(i.slot[3]);
    each_lane(active, [&](unsigned lane) { d[lane] = first >> lane & 1 ? a[lane] : b[lane]; });
    return Step::Next;
}

template <class Make> Handler by_width(Decoder& d, Type type, Make make) {
    return by_unsigned(d, Type{Type::Bits, type.bytes}, make);
}

void selp(Decoder& d) {
    Type type = d.type();
    same_type(d, type, 2);
    d.out.slot[3] = d.read(3, PRED);
    d.out.run = by_width(d, type, [](auto tag) -> Handler { return select<PTX_TYPE(tag)>; });
}

template <class T, class C, bool flush> Step select_by_sign(Warp& warp, const Instruction& i, Mask active) {
    T* d = warp.values<T>(i.slot[0]);
    const T *a = warp.values<T>(i.slot[1]), *b = warp.values<T>(i.slot[2]);
    const C* c = warp.values<C>(i.slot[3]);
    each_lane(active, [&](unsigned lane) {
        bool first = c[lane] >= 0;
        if constexpr (flush) first = c[lane] > -0x1p-126f;
        d[lane] = first ? a[lane] : b[lane];          // a NaN selects b
    });
    return Step::Next;
}

void slct(Decoder& d) {
    bool flush = d.has("ftz");
    Type type = d.type(), by = d.type();
    same_type(d, type, 2);
    d.out.slot[3] = d.read(3, by);
    if (!by.is(Type::Signed, 4) && !by.is(Type::Float, 4)) d.unsupported("s32 or f32 was expected");
    d.out.run = by_width(d, type, [&](auto tag) -> Handler {
        using T = PTX_TYPE(tag);
        if (by.kind == Type::Signed) return select_by_sign<T, int32_t, false>;
        return flush ? select_by_sign<T, float, true> : select_by_sign<T, float, false>;
    });
}

}  // namespace

Table comparison_instructions() {
    return {
        {"set", "9.7.6.1", set},
        {"setp", "9.7.6.2", setp},
        {"selp", "9.7.6.3", selp},
        {"slct", "9.7.6.4", slct},
    };
}

}  // namespace ptx

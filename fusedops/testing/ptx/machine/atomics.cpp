// Atomic operations. PTX ISA 9.7.13.5 and 9.7.13.6. Lanes take their turn in ascending order, or in any under a random
// schedule.
#include <cmath>
#include <cstring>

#include "launch.h"
#include "numbers.h"
#include "ordering.h"
#include "pick.h"

namespace ptx {

namespace {

enum { OFFSET, SPACE, BYTES, ACQUIRE, RELEASE };      // in number[]; BYTES: of all elements of one lane

// Each is what memory gets: from what it had, the operand, and the second operand of cas.
template <class T> T exchanged(T, T b, T) { return b; }
template <class T> T compared(T old, T b, T c) { return old == b ? c : old; }
template <class T> T both(T old, T b, T) { return old & b; }
template <class T> T either(T old, T b, T) { return old | b; }
template <class T> T exclusive(T old, T b, T) { return old ^ b; }
template <class T> T least(T old, T b, T) { return b < old ? b : old; }
template <class T> T greatest(T old, T b, T) { return b > old ? b : old; }
template <class T> T sum(T old, T b, T) { return old + b; }
uint32_t wrapped_up(uint32_t old, uint32_t b, uint32_t) { return old >= b ? 0 : old + 1; }
uint32_t wrapped_down(uint32_t old, uint32_t b, uint32_t) { return old == 0 || old > b ? b : old - 1; }

float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
uint32_t sum_f32(uint32_t old, uint32_t b, uint32_t) {
    return bit_cast<uint32_t>(canonical(bit_cast<float>(old) + bit_cast<float>(b)));
}
uint32_t sum_f32_flushed(uint32_t old, uint32_t b, uint32_t) {
    float result = flushed(flushed(bit_cast<float>(old)) + flushed(bit_cast<float>(b)));
    return bit_cast<uint32_t>(canonical(result));
}
uint64_t sum_f64(uint64_t old, uint64_t b, uint64_t) {
    return bit_cast<uint64_t>(bit_cast<double>(old) + bit_cast<double>(b));
}

// A float holds the exact sum of two f16 or bf16 well enough that rounding twice gives what rounding once gives.
template <float (*from)(uint16_t), uint16_t (*to)(float)> uint16_t sum_half(uint16_t old, uint16_t b, uint16_t) {
    return to(from(old) + from(b));
}
template <float (*from)(uint16_t), bool LEAST> uint16_t extreme_half(uint16_t old, uint16_t b, uint16_t) {
    constexpr uint16_t NOT_A_NUMBER = 0x7FFF;
    float x = from(old), y = from(b);
    if (x != x) return y != y ? NOT_A_NUMBER : b;
    if (y != y) return old;
    if (x == y) return (LEAST ? std::signbit(x) : std::signbit(y)) ? old : b;   // -0 is less than +0
    return (x < y) == LEAST ? old : b;
}
template <uint16_t (*f)(uint16_t, uint16_t, uint16_t)> uint32_t pairwise(uint32_t old, uint32_t b, uint32_t) {
    return f((uint16_t)old, (uint16_t)b, 0) | (uint32_t)f(old >> 16, b >> 16, 0) << 16;
}

struct Order {
    uint8_t lane[LANES];
    explicit Order(Warp& warp) {
        for (unsigned i = 0; i < LANES; i++) lane[i] = i;
        if (warp.launch().schedule.order != Schedule::Random) return;
        for (unsigned i = LANES; i > 1; i--) std::swap(lane[i - 1], lane[warp.cluster().draw() % i]);
    }
};

// list[0] gets what memory held (empty for red), list[1] and list[2] are the operands.
template <class T, T (*f)(T, T, T)> Step atomic(Warp& warp, const Instruction& i, Mask active) {
    uint64_t addresses[LANES];
    uint8_t* places[LANES];
    lane_addresses(warp, i.slot[1], i.number[OFFSET], active, addresses);
    warp.launch().memory.at({&warp, &i}, active, (Space)i.number[SPACE], addresses, i.number[BYTES], i.number[BYTES],
                            Access::Atomic, places);
    acquire(warp, active, places, (Sync)i.number[ACQUIRE]);
    release(warp, active, places, (Sync)i.number[RELEASE]);
    Order order(warp);
    for (size_t k = 0; k < i.list[1].size(); k++) {
        T* d = i.list[0].empty() ? nullptr : warp.values<T>(i.list[0][k]);
        const T* b = warp.values<T>(i.list[1][k]);
        const T* c = i.list[2].empty() ? b : warp.values<T>(i.list[2][k]);
        for (unsigned lane : order.lane) {
            if (!(active >> lane & 1)) continue;
            T old;
            memcpy(&old, places[lane] + k * sizeof(T), sizeof(T));
            T made = f(old, b[lane], c[lane]);
            memcpy(places[lane] + k * sizeof(T), &made, sizeof(T));
            if (d) d[lane] = old;
        }
    }
    return i.list[0].empty() ? Step::Next : Step::Yield;   // who tries again and again waits for another warp
}

// Subnormal numbers are flushed by the addition of f32 in global memory, and kept by that in shared memory.
Step add_f32(Warp& warp, const Instruction& i, Mask active) {
    uint64_t address = warp.get(i.slot[1], __builtin_ctz(active)) + i.number[OFFSET];
    bool global = i.number[SPACE] == (int64_t)Space::Global ||
                  (i.number[SPACE] == (int64_t)Space::Generic && address >> WINDOW_SHIFT == 0);
    return global ? atomic<uint32_t, sum_f32_flushed>(warp, i, active) : atomic<uint32_t, sum_f32>(warp, i, active);
}

Handler add_of(Decoder& d, Type type) {
    if (type.is(Type::Float, 4)) return add_f32;
    if (type.is(Type::Float, 8)) return atomic<uint64_t, sum_f64>;
    d.ignore({"noftz"});
    if (type.is(Type::Float, 2)) return atomic<uint16_t, sum_half<from_f16, to_f16>>;
    if (type.is(Type::Brain, 2)) return atomic<uint16_t, sum_half<from_bf16, to_bf16>>;
    if (type.kind == Type::FloatPair) return atomic<uint32_t, pairwise<sum_half<from_f16, to_f16>>>;
    if (type.kind == Type::BrainPair) return atomic<uint32_t, pairwise<sum_half<from_bf16, to_bf16>>>;
    if (type.is(Type::Unsigned, 4) || type.is(Type::Signed, 4)) return atomic<uint32_t, sum<uint32_t>>;
    if (type.is(Type::Unsigned, 8) || type.is(Type::Signed, 8)) return atomic<uint64_t, sum<uint64_t>>;
    d.unsupported("add of this type");
}

template <bool LEAST, class T> Handler extreme() {
    if constexpr (LEAST) return atomic<T, least<T>>;
    else return atomic<T, greatest<T>>;
}
template <bool LEAST> Handler extreme_of(Decoder& d, Type type) {
    if (type.is(Type::Unsigned, 4)) return extreme<LEAST, uint32_t>();
    if (type.is(Type::Signed, 4)) return extreme<LEAST, int32_t>();
    if (type.is(Type::Unsigned, 8)) return extreme<LEAST, uint64_t>();
    if (type.is(Type::Signed, 8)) return extreme<LEAST, int64_t>();
    d.ignore({"noftz"});
    if (type.is(Type::Float, 2)) return atomic<uint16_t, extreme_half<from_f16, LEAST>>;
    if (type.is(Type::Brain, 2)) return atomic<uint16_t, extreme_half<from_bf16, LEAST>>;
    if (type.kind == Type::FloatPair) return atomic<uint32_t, pairwise<extreme_half<from_f16, LEAST>>>;
    if (type.kind == Type::BrainPair) return atomic<uint32_t, pairwise<extreme_half<from_bf16, LEAST>>>;
    d.unsupported("min and max of this type");
}

Handler bits_of(Decoder& d, const std::string& operation, Type type) {
    if (type.kind != Type::Bits) d.unsupported("the type must be of bits");
    if (operation == "exch" && type.bytes == 16) return atomic<Bits128, exchanged<Bits128>>;
    if (operation == "cas" && type.bytes == 16) return atomic<Bits128, compared<Bits128>>;
    if (operation == "cas" && type.bytes == 2) return atomic<uint16_t, compared<uint16_t>>;
    if (type.bytes != 4 && type.bytes != 8) d.unsupported("the width");
    return by_unsigned(d, type, [&](auto tag) -> Handler {
        using T = typename decltype(tag)::type;
        if (operation == "exch") return atomic<T, exchanged<T>>;
        if (operation == "cas") return atomic<T, compared<T>>;
        if (operation == "and") return atomic<T, both<T>>;
        return operation == "or" ? atomic<T, either<T>> : atomic<T, exclusive<T>>;
    });
}

Handler handler_of(Decoder& d, const std::string& operation, Type type) {
    if (operation == "add") return add_of(d, type);
    if (operation == "min") return extreme_of<true>(d, type);
    if (operation == "max") return extreme_of<false>(d, type);
    if (operation != "inc" && operation != "dec") return bits_of(d, operation, type);
    if (!type.is(Type::Unsigned, 4)) d.unsupported("inc and dec are of .u32");
    return operation == "inc" ? atomic<uint32_t, wrapped_up> : atomic<uint32_t, wrapped_down>;
}

void modifiers(Decoder& d) {
    std::string space = d.one_of({"global", "shared", "shared::cta", "shared::cluster"}, false);
    d.out.number[SPACE] = (int64_t)(space.empty() ? Space::Generic : space == "global" ? Space::Global : Space::Shared);
    std::string order = d.one_of({"relaxed", "acquire", "release", "acq_rel"}, false);
    d.ignore({"cta", "cluster", "gpu", "sys", "L2::cache_hint"});
    auto sync = [&](const char* half) { return (int64_t)(order == half || order == "acq_rel" ? Sync::Ordered
                                                                                             : Sync::Relaxed); };
    d.out.number[ACQUIRE] = sync("acquire"), d.out.number[RELEASE] = sync("release");
}

// `address` is the index of its operand; what comes before is the destination.
void decode(Decoder& d, size_t address) {
    modifiers(d);
    std::string operation = d.one_of({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
    std::string vector = d.one_of({"v2", "v4", "v8"}, false);
    Type type = d.type();
    if (!vector.empty() && (type.is_integer() || type.is(Type::Float, 8))) d.unsupported("a vector of this type");
    d.out.run = handler_of(d, operation, type);
    if (address == 1) d.out.list[0] = d.write_list(0, type);
    d.out.slot[1] = d.address(d.operand(address), d.out.number[OFFSET]);
    size_t next = address + 1;
    d.out.list[1] = d.read_list(next++, type);
    if (operation == "cas") d.out.list[2] = d.read_list(next++, type);
    if (next < d.operands()) d.read(next, B64);       // a cache policy
    size_t count = vector.empty() ? 1 : vector[1] - '0';
    if (d.out.list[1].size() != count) d.unsupported("the number of elements");
    d.out.number[BYTES] = type.bytes * count;
}

void atom(Decoder& d) { decode(d, 1); }
void red(Decoder& d) { decode(d, 0); }

}  // namespace

Table atomic_instructions() {
    return {
        {"atom", "9.7.13.5", atom},
        {"red", "9.7.13.6", red},
    };
}

}  // namespace ptx

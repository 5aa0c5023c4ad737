// Loads and stores, and the hints beside them. PTX ISA 9.7.9.
#include <cstring>

#include "decoder.h"
#include "launch.h"
#include "ordering.h"

namespace ptx {

namespace {

// What an instruction keeps in number[]: the offset of its address, then these.
enum { OFFSET, SPACE, BYTES, ACCESS, SYNC };          // BYTES: of all elements of one lane

template <class T> T at_place(const uint8_t* place) {
    T value;
    memcpy(&value, place, sizeof(T));
    return value;
}

// One element of every lane into registers at least as wide; a signed T fills them with its sign.
template <class T, class R> void load_element(R* to, uint8_t* const* places, size_t offset, Mask active) {
    each_lane(active, [&](unsigned lane) { to[lane] = (R)at_place<T>(places[lane] + offset); });
}
template <class T> void load_element(Warp& warp, const Slot& to, uint8_t* const* places, size_t offset, Mask active) {
    if constexpr (sizeof(T) <= 2)
        if (to.bytes == 2) return load_element<T>(warp.values<uint16_t>(to), places, offset, active);
    if constexpr (sizeof(T) <= 4)
        if (to.bytes == 4) return load_element<T>(warp.values<uint32_t>(to), places, offset, active);
    if constexpr (sizeof(T) <= 8)
        if (to.bytes == 8) return load_element<T>(warp.values<uint64_t>(to), places, offset, active);
    if constexpr (sizeof(T) == 16) load_element<T>(warp.values<Bits128>(to), places, offset, active);
}

template <class T> Step load(Warp& warp, const Instruction& i, Mask active) {
    uint64_t addresses[LANES];
    uint8_t* places[LANES];
    lane_addresses(warp, i.slot[1], i.number[OFFSET], active, addresses);
    warp.launch().memory.at({&warp, &i}, active, (Space)i.number[SPACE], addresses, i.number[BYTES], i.number[BYTES],
                            (Access)i.number[ACCESS], places);
    if (i.number[SYNC]) acquire(warp, active, places, (Sync)i.number[SYNC]);
    size_t offset = 0;
    for (const Slot& to : i.list[0]) {
        load_element<T>(warp, to, places, offset, active);
        offset += sizeof(T);
    }
    return i.number[SYNC] ? Step::Yield : Step::Next; // who looks at it again and again waits for another warp
}

// From an address that is the same in all lanes: parameters, mostly.
template <class T> Step load_parameter(Warp& warp, const Instruction& i, Mask active) {
    uint64_t address = warp.get(i.slot[1], 0) + i.number[OFFSET];
    uint8_t* place = warp.launch().memory.at({&warp, &i}, Space::Param, address, i.number[BYTES], i.number[BYTES],
                                             Access::Read);
    uint8_t* places[LANES];
    for (auto& one : places) one = place;
    size_t offset = 0;
    for (const Slot& to : i.list[0]) {
        load_element<T>(warp, to, places, offset, active);
        offset += sizeof(T);
    }
    return Step::Next;
}

template <class T, class R>
bool store_element(const R* from, uint8_t* const* places, size_t offset, Mask active) {
    each_lane(active, [&](unsigned lane) {
        T value = (T)from[lane];
        memcpy(places[lane] + offset, &value, sizeof(T));
    });
    bool differs = false;
    each_lane(active, [&](unsigned lane) { differs |= at_place<T>(places[lane] + offset) != (T)from[lane]; });
    return differs;
}
// Whether another lane left another value at the same place.
template <class T>
bool store_element(Warp& warp, const Slot& from, uint8_t* const* places, size_t offset, Mask active) {
    if constexpr (sizeof(T) <= 2)
        if (from.bytes == 2) return store_element<T>(warp.values<uint16_t>(from), places, offset, active);
    if constexpr (sizeof(T) <= 4)
        if (from.bytes == 4) return store_element<T>(warp.values<uint32_t>(from), places, offset, active);
    if constexpr (sizeof(T) <= 8)
        if (from.bytes == 8) return store_element<T>(warp.values<uint64_t>(from), places, offset, active);
    if constexpr (sizeof(T) == 16) return store_element<T>(warp.values<Bits128>(from), places, offset, active);
    return false;
}

[[noreturn]] void lanes_differ(Warp& warp, const Instruction& i, Mask active, uint8_t* const* places) {
    unsigned bytes = i.number[BYTES];
    for (unsigned lane = 0; lane < LANES; lane++)
        for (unsigned other = 0; other < lane; other++)
            if ((active >> lane & active >> other & 1) && places[lane] < places[other] + bytes &&
                places[other] < places[lane] + bytes) {
                Actor actor{&warp, &i, (int)lane};
                fault(actor, format("data race within a store: lanes %u and %u write different values to the same "
                                    "bytes", other, lane));
            }
    throw Fault("data race within a store");
}

template <class T> Step store(Warp& warp, const Instruction& i, Mask active) {
    uint64_t addresses[LANES];
    uint8_t* places[LANES];
    lane_addresses(warp, i.slot[0], i.number[OFFSET], active, addresses);
    Launch& launch = warp.launch();
    Access access = (Access)i.number[ACCESS];
    launch.memory.at({&warp, &i}, active, (Space)i.number[SPACE], addresses, i.number[BYTES], i.number[BYTES], access,
                     places);
    if (i.number[SYNC]) release(warp, active, places, (Sync)i.number[SYNC]);
    size_t offset = 0;
    bool differs = false;
    for (const Slot& from : i.list[0]) {
        differs |= store_element<T>(warp, from, places, offset, active);
        offset += sizeof(T);
    }
    if (differs && access == Access::Write && launch.checking(Checks::Races)) lanes_differ(warp, i, active, places);
    return Step::Next;
}

// ---- decoding
Space space_of(Decoder& d) {
    std::string name = d.one_of({"global", "shared", "shared::cta", "shared::cluster", "local", "const", "param",
                                 "param::entry", "param::func"}, false);
    if (name.empty()) return Space::Generic;
    if (name == "global") return Space::Global;
    if (name == "local") return Space::Local;
    if (name == "const") return Space::Const;
    return name.compare(0, 5, "param") == 0 ? Space::Param : Space::Shared;
}

void ignore_caching(Decoder& d) {
    d.ignore({"weak", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged",
              "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::evict_normal", "L2::evict_first",
              "L2::evict_last", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"});
}

// .volatile, .relaxed, .acquire, .release with their scope.
void ordering(Decoder& d, Access plain, Access strong) {
    std::string name = d.one_of({"volatile", "relaxed", "acquire", "release", "mmio"}, false);
    if (name == "mmio") name = d.one_of({"relaxed", "acquire", "release"});
    if (name != "volatile" && !name.empty()) d.one_of({"cta", "cluster", "gpu", "sys"});
    d.out.number[ACCESS] = (int64_t)(name.empty() ? plain : strong);
    d.out.number[SYNC] = (int64_t)(name.empty() ? Sync::None
                                   : name == "acquire" || name == "release" ? Sync::Ordered : Sync::Relaxed);
}

void elements(Decoder& d, const Operand& operand, Type type, size_t wanted, bool writes) {
    auto& list = d.out.list[0];
    if (operand.kind == Operand::Vector)
        for (auto& part : operand.parts) list.push_back(d.loose(part, type, writes));
    else list.push_back(d.loose(operand, type, writes));
    if (list.size() != wanted) d.unsupported("the number of elements");
}

size_t vector_size(Decoder& d) {
    std::string vector = d.one_of({"v2", "v4", "v8"}, false);
    return vector.empty() ? 1 : vector[1] - '0';
}

template <class T> Handler pick_load(bool parameter) { return parameter ? load_parameter<T> : load<T>; }

Handler pick_load(Decoder& d, Type type, bool parameter) {
    bool sign = type.kind == Type::Signed;
    switch (type.bytes) {
    case 1: return sign ? pick_load<int8_t>(parameter) : pick_load<uint8_t>(parameter);
    case 2: return sign ? pick_load<int16_t>(parameter) : pick_load<uint16_t>(parameter);
    case 4: return sign ? pick_load<int32_t>(parameter) : pick_load<uint32_t>(parameter);
    case 8: return pick_load<uint64_t>(parameter);
    case 16: return pick_load<Bits128>(parameter);
    default: d.unsupported("the type");
    }
}

Step copy_result(Warp& warp, const Instruction& i, Mask active) {
    uint32_t* to = warp.values<uint32_t>(i.list[0][0]);
    const uint32_t* from = warp.values<uint32_t>(i.slot[1]);
    each_lane(active, [&](unsigned lane) { to[lane] = from[lane]; });
    return Step::Next;
}

// What a call returned lies in a place like a register.
void call_result(Decoder& d, Type type) {
    if (d.out.list[0].size() != 1 || type.bytes != 4 || d.out.list[0][0].bytes != 4)
        d.unsupported("the width of a result");
    d.out.run = copy_result;
}

void ld(Decoder& d) {
    Space space = space_of(d);
    ordering(d, Access::Read, Access::StrongRead);
    ignore_caching(d);
    size_t count = vector_size(d);
    Type type = d.type();
    elements(d, d.operand(0), type, count, true);
    d.out.slot[1] = d.address(d.operand(1), d.out.number[OFFSET]);
    if (d.operands() > 2) d.read(2, B64);             // a cache policy
    d.out.number[SPACE] = (int64_t)space;
    d.out.number[BYTES] = type.bytes * count;
    bool same_address = space == Space::Param && d.operand(1).parts[0].name[0] != '%';
    if (same_address && d.is_register(d.operand(1).parts[0])) return call_result(d, type);
    d.out.run = pick_load(d, type, same_address);
}

void st(Decoder& d) {
    d.out.number[SPACE] = (int64_t)space_of(d);
    ordering(d, Access::Write, Access::StrongWrite);
    ignore_caching(d);
    size_t count = vector_size(d);
    Type type = d.type();
    elements(d, d.operand(1), type, count, false);
    d.out.slot[0] = d.address(d.operand(0), d.out.number[OFFSET]);
    if (d.operands() > 2) d.read(2, B64);
    d.out.number[BYTES] = type.bytes * count;
    d.out.run = type.bytes == 1 ? store<uint8_t> : type.bytes == 2 ? store<uint16_t> : type.bytes == 4 ? store<uint32_t>
                : type.bytes == 8 ? store<uint64_t> : store<Bits128>;
}

// ---- hints: their operands are read and nothing happens
Step nothing(Warp&, const Instruction&, Mask) { return Step::Next; }

void hint(Decoder& d) {
    space_of(d);
    d.ignore({"L1", "L2", "L2::evict_last", "L2::evict_normal", "L1::evict_normal", "tensormap"});
    d.address(d.operand(0), d.out.number[OFFSET]);
    if (d.operands() > 1) d.integer(1);
    d.out.run = nothing;
}

Step no_policy(Warp& warp, const Instruction& i, Mask active) {
    uint64_t* to = warp.values<uint64_t>(i.slot[0]);
    each_lane(active, [&](unsigned lane) { to[lane] = 0; });
    return Step::Next;
}

void policy(Decoder& d) {                             // the policy itself has no bits that anyone may look at
    while (!d.peek().empty()) d.next();
    d.out.slot[0] = d.write(0, B64);
    d.out.run = no_policy;
}

// discard lets go of what memory holds; here the bytes stay as they are, which is one of the outcomes allowed.
void discard(Decoder& d) {
    d.ignore({"global", "L2"});
    d.address(d.operand(0), d.out.number[OFFSET]);
    if (d.integer(1) != 128) d.unsupported("the size is always 128");
    d.out.run = nothing;
}

}  // namespace

Table memory_instructions() {
    return {
        {"ld", "9.7.9.8", ld},                        // and ld.global.nc, 9.7.9.9
        {"ldu", "9.7.9.10", ld},
        {"st", "9.7.9.11", st},
        {"prefetch", "9.7.9.15", hint},
        {"prefetchu", "9.7.9.15", hint},
        {"applypriority", "9.7.9.16", hint},
        {"discard", "9.7.9.17", discard},
        {"createpolicy", "9.7.9.18", policy},
    };
}

}  // namespace ptx

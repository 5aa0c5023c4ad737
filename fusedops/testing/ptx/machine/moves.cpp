// Moves, packing and unpacking, and addresses of the state spaces. PTX ISA 9.7.9.
#include <cstring>

#include "launch.h"
#include "pick.h"

namespace ptx {

namespace {

struct Wide {                                         // .b128
    uint64_t low, high;
};

template <class T> T same(T x) { return x; }

Step copy_predicate(Warp& warp, const Instruction& i, Mask active) {
    warp.set_predicate(i.slot[0], warp.predicate(i.slot[1]), active);
    return Step::Next;
}

// {a, b, ...} = d: the first part is the lowest.
template <class Part, class Whole> Step unpack(Warp& warp, const Instruction& i, Mask active) {
    const Whole* from = warp.values<Whole>(i.slot[0]);
    for (size_t k = 0; k < i.list[0].size(); k++) {
        if (!i.list[0][k]) continue;                  // "_"
        Part* to = warp.values<Part>(i.list[0][k]);
        unsigned shift = k * sizeof(Part) * 8;
        each_lane(active, [&](unsigned lane) { to[lane] = (Part)(from[lane] >> shift); });
    }
    return Step::Next;
}
template <class Part, class Whole> Step pack(Warp& warp, const Instruction& i, Mask active) {
    Whole packed[LANES] = {};
    for (size_t k = 0; k < i.list[0].size(); k++) {
        const Part* from = warp.values<Part>(i.list[0][k]);
        unsigned shift = k * sizeof(Part) * 8;
        each_lane(ALL, [&](unsigned lane) { packed[lane] |= (Whole)from[lane] << shift; });
    }
    Whole* to = warp.values<Whole>(i.slot[0]);
    each_lane(active, [&](unsigned lane) { to[lane] = packed[lane]; });
    return Step::Next;
}

// Bytes have registers of 16 bits, and .b128 has no shifts: these go lane by lane.
Step move_parts(Warp& warp, const Instruction& i, Mask active) {
    unsigned bytes = i.number[0];
    bool to_parts = i.number[1];
    each_lane(active, [&](unsigned lane) {
        uint8_t whole[16];
        uint8_t* at = warp.values<uint8_t>(i.slot[0]) + lane * i.slot[0].bytes;
        if (to_parts) memcpy(whole, at, i.slot[0].bytes);
        for (size_t k = 0; k < i.list[0].size(); k++) {
            uint64_t part = 0;
            if (to_parts) {
                memcpy(&part, whole + k * bytes, bytes);
                if (i.list[0][k]) warp.set(i.list[0][k], lane, part);
            } else {
                part = warp.get(i.list[0][k], lane);
                memcpy(whole + k * bytes, &part, bytes);
            }
        }
        if (!to_parts) memcpy(at, whole, i.slot[0].bytes);
    });
    return Step::Next;
}

template <class Part, class Whole> Handler mover(bool to_parts) {
    return to_parts ? unpack<Part, Whole> : pack<Part, Whole>;
}

void mov_vector(Decoder& d, Type type, bool to_parts) {
    const std::vector<Operand>& parts = d.operand(to_parts ? 0 : 1).parts;
    unsigned bytes = type.bytes / parts.size();
    if (parts.empty() || bytes * parts.size() != type.bytes) d.unsupported("the number of parts");
    Type part{Type::Bits, bytes};
    for (const Operand& one : parts)
        d.out.list[0].push_back(one.name == "_" ? Slot() : d.loose(one, part, to_parts));
    d.out.slot[0] = to_parts ? d.read(1, type) : d.write(0, type);
    d.out.number[0] = bytes, d.out.number[1] = to_parts;
    d.out.run = move_parts;
    if (type.bytes == 4 && bytes == 2) d.out.run = mover<uint16_t, uint32_t>(to_parts);
    if (type.bytes == 8 && bytes == 2) d.out.run = mover<uint16_t, uint64_t>(to_parts);
    if (type.bytes == 8 && bytes == 4) d.out.run = mover<uint32_t, uint64_t>(to_parts);
}

// Clocks count the instructions that the launch has run: they never go back.
Step read_clock(Warp& warp, const Instruction& i, Mask active) {
    uint64_t now = warp.launch().steps >> i.number[0];
    each_lane(active, [&](unsigned lane) { warp.set(i.slot[0], lane, now); });
    return Step::Next;
}

bool is_clock(const std::string& name) { return name.rfind("%clock", 0) == 0 || name.rfind("%globaltimer", 0) == 0; }

void mov(Decoder& d) {
    Type type = d.type();
    if (d.operand(0).kind == Operand::Vector || d.operand(1).kind == Operand::Vector)
        return mov_vector(d, type, d.operand(0).kind == Operand::Vector);
    d.out.slot[0] = d.write(0, type);
    if (is_clock(d.operand(1).name)) {
        d.out.number[0] = d.operand(1).name.find("_hi") == std::string::npos ? 0 : 32;
        d.out.run = read_clock;
        return;
    }
    d.out.slot[1] = d.read(1, type);
    switch (type.bytes) {
    case 0: d.out.run = copy_predicate; break;
    case 2: d.out.run = unary<uint16_t, uint16_t, same<uint16_t>>; break;
    case 4: d.out.run = unary<uint32_t, uint32_t, same<uint32_t>>; break;
    case 8: d.out.run = unary<uint64_t, uint64_t, same<uint64_t>>; break;
    case 16: d.out.run = unary<Wide, Wide, same<Wide>>; break;
    default: d.unsupported("the width");
    }
}

// ---- addresses
constexpr uint64_t WINDOW = 0xFFull << 56;            // which space a generic address names; 0: the host's own

Space space_of(const std::string& name) {
    if (name.rfind("shared", 0) == 0) return Space::Shared;
    return name == "local" ? Space::Local : name == "param" ? Space::Param : Space::Global;
}

uint64_t window_of(Space space) {
    switch (space) {
    case Space::Shared: return SHARED_WINDOW;
    case Space::Local: return LOCAL_WINDOW;
    case Space::Param: return PARAM_WINDOW;
    default: return 0;
    }
}

template <bool to_space> Step convert_address(Warp& warp, const Instruction& i, Mask active) {
    uint64_t* to = warp.values<uint64_t>(i.slot[0]);
    const uint64_t* from = warp.values<uint64_t>(i.slot[1]);
    uint64_t window = i.number[0];
    each_lane(active, [&](unsigned lane) { to[lane] = to_space ? from[lane] & ~window : from[lane] | window; });
    return Step::Next;
}

constexpr std::initializer_list<const char*> SPACES = {"global", "shared", "shared::cta", "shared::cluster", "local",
                                                       "const",  "param",  "param::entry"};

void cvta(Decoder& d) {
    bool to_space = d.has("to");
    std::string name = d.one_of(SPACES);
    Type type = d.type();
    if (type.bytes != 8) d.unsupported("addresses have 64 bits");
    d.out.number[0] = window_of(space_of(name.substr(0, name.find("::entry"))));
    same_type(d, type, 1);
    d.out.run = to_space ? convert_address<true> : convert_address<false>;
}

// Constants lie among the host's own addresses, and are not global.
Mask in_constants(Warp& warp, const uint64_t* address, Mask active) {
    Mask result = 0;
    for (auto& one : warp.launch().program.variables)
        if (one.declared->space == "const")
            each_lane(active, [&](unsigned lane) {
                result |= (Mask)(address[lane] - one.address() < one.bytes()) << lane;
            });
    return result;
}

Step is_space(Warp& warp, const Instruction& i, Mask active) {
    uint64_t window = i.number[0];
    const uint64_t* address = warp.values<uint64_t>(i.slot[1]);
    Mask result = 0;
    each_lane(active, [&](unsigned lane) {
        uint64_t rank = (address[lane] & ~WINDOW) >> RANK_SHIFT;      // 0: this block's own
        bool other = i.number[1] && rank != 0 && rank != warp.block.rank + 1;
        result |= (Mask)((address[lane] & WINDOW) == window && !other) << lane;
    });
    if (window == 0) result &= ~in_constants(warp, address, active);
    warp.set_predicate(i.slot[0], result, active);
    return Step::Next;
}

Step is_const(Warp& warp, const Instruction& i, Mask active) {
    warp.set_predicate(i.slot[0], in_constants(warp, warp.values<uint64_t>(i.slot[1]), active), active);
    return Step::Next;
}

void isspacep(Decoder& d) {
    std::string name = d.one_of(SPACES);
    d.out.number[0] = window_of(space_of(name.substr(0, name.find("::entry"))));
    d.out.number[1] = name == "shared" || name == "shared::cta";
    d.out.slot[0] = d.write(0, PRED);
    d.out.slot[1] = d.read(1, B64);
    d.out.run = name == "const" ? is_const : is_space;
}

}  // namespace

Table move_instructions() {
    return {
        {"mov", "9.7.9.2", mov},
        {"isspacep", "9.7.9.19", isspacep},
        {"cvta", "9.7.9.20", cvta},
    };
}

}  // namespace ptx

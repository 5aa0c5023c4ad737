// Tensor maps, and the instructions that make and change them. PTX ISA 9.7.9.26.
#include "tensor_map.h"

#include <cstring>
#include <unordered_map>

#include "decoder.h"

namespace ptx {

namespace {

constexpr unsigned BYTES = sizeof(TensorMap), ALIGNMENT = 64;

// Maps made by a kernel: which version of them lies where, and which one a block has acquired.
struct Made {
    std::unordered_map<uint64_t, uint64_t> version;
};

}  // namespace

unsigned TensorMap::element_bytes() const {
    constexpr uint8_t bytes[TYPES] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    return bytes[type];
}

unsigned TensorMap::count(unsigned dim) const {
    return dim ? (box[dim] + element_strides[dim] - 1u) / element_strides[dim] : box[0];
}

unsigned TensorMap::box_bytes() const {
    unsigned bytes = element_bytes();
    for (unsigned dim = 0; dim < rank(); dim++) bytes *= count(dim);
    return bytes;
}

std::string complaint(const TensorMap& map) {
    if (map.type >= TensorMap::TYPES || map.swizzle >= TensorMap::SWIZZLES || map.rank() > MAX_RANK)
        return "type, swizzle and rank must be known ones: is this a tensor map?";
    if (map.interleave) return "interleaved layouts are not supported";
    if (map.address % 16)
        return format("address must be a multiple of 16, got 0x%llx", (unsigned long long)map.address);
    for (unsigned dim = 0; dim < map.rank(); dim++) {
        if (map.dims[dim] == 0) return format("the size of dimension %u must not be 0", dim);
        if (map.box[dim] == 0 || map.box[dim] > 256)
            return format("box must be 1 to 256 in dimension %u, got %u", dim, map.box[dim]);
        if (map.element_strides[dim] == 0 || map.element_strides[dim] > 8)
            return format("element stride must be 1 to 8 in dimension %u, got %u", dim, map.element_strides[dim]);
        if (dim && (map.strides[dim - 1] % 16 || map.strides[dim - 1] >> 40))
            return format("stride of dimension %u must be a multiple of 16 bytes below 2**40, got %llu", dim,
                          (unsigned long long)map.strides[dim - 1]);
    }
    unsigned row = map.count(0) * map.element_bytes(), pattern = map.swizzle ? 16u << map.swizzle : ~0u;
    if (row % 16) return format("a row of the box must be a multiple of 16 bytes, got %u", row);
    if (row > pattern)
        return format("a row of the box must be at most the %u bytes of the swizzle, got %u", pattern, row);
    bool floating = map.type >= TensorMap::F16;
    if (map.fill_nan && !floating) return "NaN fill must come with a floating-point type";
    return "";
}

namespace {

// CUtensorMapDataType to the numbers of tensormap.replace.
constexpr uint8_t DRIVER_TYPES[] = {
    TensorMap::U8,  TensorMap::U16, TensorMap::U32, TensorMap::S32,  TensorMap::U64,     TensorMap::S64,
    TensorMap::F16, TensorMap::F32, TensorMap::F64, TensorMap::BF16, TensorMap::F32_FTZ, TensorMap::TF32,
    TensorMap::TF32_FTZ};

}  // namespace

TensorMap encode_tiled(const TensorMapRequest& request) {
    TensorMap map{};
    if (request.rank == 0 || request.rank > MAX_RANK) throw Fault(format("rank must be 1 to 5, got %u", request.rank));
    if (request.type >= std::size(DRIVER_TYPES)) throw Fault(format("data type %u is not supported", request.type));
    if (request.swizzle >= TensorMap::SWIZZLES) throw Fault(format("swizzle %u is not supported", request.swizzle));
    if (request.fill > 1) throw Fault(format("fill must be 0 or 1, got %u", request.fill));
    map.address = request.address;
    map.rank_less_one = request.rank - 1;
    map.type = DRIVER_TYPES[request.type];
    map.interleave = request.interleave, map.swizzle = request.swizzle, map.fill_nan = request.fill;
    for (unsigned dim = 0; dim < request.rank; dim++) {
        if (request.sizes[dim] >> 32)
            throw Fault(format("size of dimension %u must be below 2**32, got %llu", dim,
                               (unsigned long long)request.sizes[dim]));
        if (request.box[dim] > 256)
            throw Fault(format("box must be 1 to 256 in dimension %u, got %u", dim, request.box[dim]));
        if (request.element_strides[dim] > 8)
            throw Fault(format("element stride must be 1 to 8 in dimension %u, got %u", dim,
                               request.element_strides[dim]));
        map.dims[dim] = request.sizes[dim], map.box[dim] = request.box[dim];
        map.element_strides[dim] = dim ? request.element_strides[dim] : 1;    // the hardware ignores the first one
        if (dim) map.strides[dim - 1] = request.strides[dim - 1];
    }
    if (std::string why = complaint(map); !why.empty()) throw Fault(why);
    return map;
}

TensorMap tensor_map_at(const Actor& actor, Space space, uint64_t address, unsigned rank) {
    TensorMap map;
    Warp& warp = *actor.warp;
    memcpy(&map, warp.launch().memory.at(actor, space, address, BYTES, ALIGNMENT, Access::Read), BYTES);
    if (auto* made = warp.launch().states.find<Made>(); made && made->version.count(address))
        if (warp.block.states.get<Made>().version[address] != made->version[address])
            fault(actor, format("the tensor map at 0x%llx was made by the kernel and is used without"
                                " fence.proxy.tensormap::generic.acquire", (unsigned long long)address));
    if (std::string why = complaint(map); !why.empty())
        fault(actor, format("the tensor map at 0x%llx: %s", (unsigned long long)address, why.c_str()));
    if (map.rank() != rank)
        fault(actor, format("the tensor map has %u dimensions, the instruction %u", map.rank(), rank));
    return map;
}

namespace {

enum Field {
    Address, Rank, BoxDim, GlobalDim, GlobalStride, ElementStride, ElementType, Interleave, SwizzleMode, Fill
};

struct FieldName {
    const char* name;
    Field field;
    uint64_t most;                   // the greatest value
    unsigned bytes;                  // of the operand
};

constexpr FieldName FIELDS[] = {
    {"global_address", Address, ~0ull, 8},  {"rank", Rank, MAX_RANK - 1, 4},
    {"box_dim", BoxDim, 256, 4},            {"global_dim", GlobalDim, ~0u, 4},
    {"global_stride", GlobalStride, (1ull << 40) - 1, 8}, {"element_stride", ElementStride, 8, 4},
    {"elemtype", ElementType, TensorMap::TYPES - 1, 4},   {"interleave_layout", Interleave, 2, 4},
    {"swizzle_mode", SwizzleMode, TensorMap::SWIZZLES - 1, 4}, {"fill_mode", Fill, 1, 4},
};

void set(TensorMap& map, Field field, unsigned at, uint64_t value) {
    switch (field) {
    case Address: map.address = value; break;
    case Rank: map.rank_less_one = value; break;
    case BoxDim: map.box[at] = value; break;
    case GlobalDim: map.dims[at] = value; break;
    case GlobalStride: map.strides[at] = value; break;
    case ElementStride: map.element_strides[at] = value; break;
    case ElementType: map.type = value; break;
    case Interleave: map.interleave = value; break;
    case SwizzleMode: map.swizzle = value; break;
    case Fill: map.fill_nan = value; break;
    }
}

// Before PTX 8.5 strides were given in units of 16 bytes.
unsigned stride_unit(const Warp& warp) {
    return std::stod(warp.launch().program.module.version) < 8.5 ? 16 : 1;
}

// slot: address, value. number: offset, space, index into FIELDS, dimension
Step replace(Warp& warp, const Instruction& i, Mask active) {
    const FieldName& field = FIELDS[i.number[2]];
    each_lane(active, [&](unsigned lane) {
        Actor actor{&warp, &i, (int)lane};
        uint64_t at = warp.get(i.slot[0], lane) + i.number[0], value = warp.get(i.slot[1], lane);
        if (field.field == GlobalStride) value *= stride_unit(warp);
        if (value > field.most)
            fault(actor, format("tensormap.replace: %s of %llu, at most %llu", field.name, (unsigned long long)value,
                                (unsigned long long)field.most));
        Memory& memory = warp.launch().memory;
        TensorMap map;
        uint8_t* place = memory.at(actor, (Space)i.number[1], at, BYTES, ALIGNMENT, Access::Write);
        memcpy(&map, place, BYTES);
        set(map, field.field, i.number[3], value);
        memcpy(place, &map, BYTES);
        bool shared = (Space)i.number[1] == Space::Shared || at >> 56 == SHARED_WINDOW >> 56;
        if (!shared) warp.launch().states.get<Made>().version[at]++;
    });
    return Step::Next;
}

void tensormap_replace(Decoder& d) {
    d.one_of({"tile"});
    std::string space = d.one_of({"global", "shared::cta"}, false);
    d.ignore({"b1024"});
    Type type = d.type();
    std::string name = d.next();
    size_t which = 0;
    while (which < std::size(FIELDS) && name != FIELDS[which].name) which++;
    if (which == std::size(FIELDS) || FIELDS[which].bytes != type.bytes) d.unsupported("no such field");
    const Field field = FIELDS[which].field;
    bool numbered = field >= BoxDim && field <= ElementStride;
    d.out.number[1] = (int64_t)(space.empty() ? Space::Generic : space == "global" ? Space::Global : Space::Shared);
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0], space != "shared::cta");
    d.out.number[2] = which;
    d.out.number[3] = numbered ? d.integer(1) : 0;
    if (d.out.number[3] < 0 || d.out.number[3] >= MAX_RANK - (field == GlobalStride)) d.unsupported("the dimension");
    d.out.slot[1] = d.read(1 + numbered, type);
    d.out.run = replace;
}

// Copies a map from shared to global memory. slot: destination, source. number: offsets
Step publish(Warp& warp, const Instruction& i, Mask active) {
    if (Step step = warp.aligned(i, active); step != Step::Next) return step;
    unsigned lane = __builtin_ctz(active);
    Actor actor{&warp, &i, (int)lane};
    Memory& memory = warp.launch().memory;
    uint64_t to = warp.get(i.slot[0], lane) + i.number[0], from = warp.get(i.slot[1], lane) + i.number[1];
    const uint8_t* source = memory.at(actor, Space::Shared, from, BYTES, ALIGNMENT, Access::Read);
    memcpy(memory.at(actor, Space::Global, to, BYTES, ALIGNMENT, Access::Write), source, BYTES);
    warp.launch().states.get<Made>().version[to]++;
    return Step::Next;
}

void cp_fenceproxy(Decoder& d) {
    d.ignore({"global", "shared::cta", "tensormap::generic", "release", "cta", "cluster", "gpu", "sys", "sync",
              "aligned"});
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0]);
    d.out.slot[1] = d.address(d.operand(1), d.out.number[1], false);
    if (d.integer(2) != BYTES) d.unsupported("128 bytes were expected");
    d.out.run = publish;
}

Step nothing(Warp&, const Instruction&, Mask) { return Step::Next; }

// slot: address. number: offset
Step acquire(Warp& warp, const Instruction& i, Mask active) {
    auto& known = warp.block.states.get<Made>().version;
    auto& made = warp.launch().states.get<Made>().version;
    each_lane(active, [&](unsigned lane) {
        uint64_t at = warp.get(i.slot[0], lane) + i.number[0];
        if (auto found = made.find(at); found != made.end()) known[at] = found->second;
    });
    return Step::Next;
}

void fence_tensormap(Decoder& d) {
    bool acquires = d.one_of({"acquire", "release"}) == "acquire";
    d.ignore({"cta", "cluster", "gpu", "sys"});
    d.out.run = nothing;
    if (!acquires) return;
    d.out.slot[0] = d.address(d.operand(0), d.out.number[0]);
    if (d.integer(1) != BYTES) d.unsupported("128 bytes were expected");
    d.out.run = acquire;
}

}  // namespace

Table tensor_map_instructions() {
    return {
        {"tensormap.replace", "9.7.9.26", tensormap_replace},
        {"tensormap.cp_fenceproxy", "9.7.13.16", cp_fenceproxy},
        {"fence.proxy.tensormap::generic", "9.7.13.4", fence_tensormap},
    };
}

}  // namespace ptx

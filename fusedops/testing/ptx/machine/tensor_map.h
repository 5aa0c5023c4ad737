// Descriptions of tensors for bulk copies of boxes (CUtensorMap), tiled mode. The 128 bytes have a layout of our own.
#pragma once
#include "launch.h"

namespace ptx {

constexpr unsigned MAX_RANK = 5;

struct TensorMap {
    // Numbers of tensormap.replace.elemtype; the enumeration of the CUDA driver orders them otherwise.
    enum Type : uint8_t { U8, U16, U32, S32, U64, S64, F16, F32, F32_FTZ, F64, BF16, TF32, TF32_FTZ, TYPES };
    enum Swizzle : uint8_t { NoSwizzle, Swizzle32, Swizzle64, Swizzle128, SWIZZLES };

    uint64_t address;
    uint64_t strides[MAX_RANK - 1];  // bytes; of dimensions 1 and up, the first has none
    uint32_t dims[MAX_RANK];
    uint16_t box[MAX_RANK];
    uint8_t element_strides[MAX_RANK];
    uint8_t rank_less_one, type, interleave, swizzle, fill_nan;
    uint8_t unused[48];

    unsigned rank() const { return rank_less_one + 1u; }
    unsigned element_bytes() const;
    unsigned count(unsigned dim) const;   // elements of the box in shared memory along a dimension; 0 has no stride
    unsigned box_bytes() const;
    // Where byte `offset` of a box lies in shared memory: bits of the row number change the order of 16-byte pieces.
    uint32_t swizzled(uint32_t offset) const {
        return offset ^ (offset >> 3 & (uint32_t)(swizzle == Swizzle128 ? 0x70 : swizzle == Swizzle64 ? 0x30
                                                  : swizzle == Swizzle32 ? 0x10 : 0));
    }
};
static_assert(sizeof(TensorMap) == 128, "a tensor map has 128 bytes");

// What the hardware asks of a map's fields; empty: all is well.
std::string complaint(const TensorMap& map);

// cuTensorMapEncodeTiled: arrays start with the contiguous dimension, `strides` in bytes with the second; throws Fault.
struct TensorMapRequest {
    uint32_t type, rank;             // type: a CUtensorMapDataType
    uint64_t address;
    const uint64_t *sizes, *strides;
    const uint32_t *box, *element_strides;
    uint32_t interleave, swizzle, fill;
};
TensorMap encode_tiled(const TensorMapRequest& request);

// A copy of the map at an address, after the checks that its use asks for; throws Fault.
TensorMap tensor_map_at(const Actor& actor, Space space, uint64_t address, unsigned rank);

}  // namespace ptx

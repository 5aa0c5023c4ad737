// What the kernels of this folder share: the library's own headers, and names for the elements.
#pragma once
#include "../../../csrc/cuda/common.cuh"
#include "../../../csrc/cuda/ptx.cuh"
#include "../../../csrc/cuda/wgmma.cuh"

using namespace fusedops;

typedef u16 bf16;                                      // its bits
typedef u8 e4m3;
typedef signed char s8;

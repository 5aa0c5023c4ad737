// Warpgroup matrix instructions and tensor maps made on the device: what only sm_90a has.
#pragma once
#include "ptx.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace fusedops {

// A warpgroup asks for more registers a thread, or gives some back; COUNT is a multiple of 8.
template <int COUNT> DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Tiles of rows of 128 bytes with the 128-byte swizzle. Offsets are given in units of 16 bytes.
// K-major: groups of 8 rows follow each other after 1024 bytes; the leading offset is not used.
DEVICE u64 k_major_tile(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
// MN-major: `next_64` bytes to the next 64 columns (of 2 bytes); groups of 8 k follow each other after 1024 bytes.
DEVICE u64 mn_major_tile(u32 address, u32 next_64) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(next_64 >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// Before the first wgmma of a group, and after registers of it were written: orders them.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of wgmma instructions.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all groups but the newest PENDING are done: their registers can be read, their tiles written again.
template <int PENDING> DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define FOUR(C, d, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define SIXTEEN(C, d, i) FOUR(C, d, i), FOUR(C, d, i + 4), FOUR(C, d, i + 8), FOUR(C, d, i + 12)
#define THIRTY_TWO(C, d, i) SIXTEEN(C, d, i), SIXTEEN(C, d, i + 16)
#define FIRST_32                                                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "  \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SECOND_32                                                                                                     \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "  \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d += a @ b for 64 x 64, both K-major tiles in shared memory. Thread t of the warpgroup holds the rows
// 16 * (t / 32) + t % 32 / 4 and 8 below, and of each 8 columns those at 2 * (t % 4).
#define WGMMA(NAME, ACC, CONSTRAINT, SHAPE, MODIFIERS)                                                                \
    DEVICE void NAME(ACC(&d)[32], u64 a, u64 b) {                                                                     \
        asm volatile("wgmma.mma_async.sync.aligned." SHAPE " {" FIRST_32 "}, %32, %33, 1" MODIFIERS ";"               \
                     : THIRTY_TWO(CONSTRAINT, d, 0)                                                                   \
                     : "l"(a), "l"(b));                                                                               \
    }
WGMMA(wgmma_bf16, float, "+f", "m64n64k16.f32.bf16.bf16", ", 1, 1, 0, 0")
WGMMA(wgmma_e4m3, float, "+f", "m64n64k32.f32.e4m3.e4m3", ", 1, 1")
WGMMA(wgmma_s8, int, "+r", "m64n64k32.s32.s8.s8", "")
#undef WGMMA

// The same with k = 32, of a two of each four columns; metadata as for mma_sparse_bf16<0>, of the warp's 16 rows.
DEVICE void wgmma_sparse_bf16(float (&d)[32], u64 a, u64 b, u32 metadata) {
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.bf16.bf16 {" FIRST_32
                 "}, %32, %33, %34, 0, 1, 1, 1, 0, 0;"
                 : THIRTY_TWO("+f", d, 0)
                 : "l"(a), "l"(b), "r"(metadata));
}
// a in registers; b MN-major.
DEVICE void wgmma_bf16_n128(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FIRST_32 ", " SECOND_32
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : THIRTY_TWO("+f", d, 0), THIRTY_TWO("+f", d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Changes a map that lies in shared memory.
DEVICE void tensor_map_set_address(u32 map_smem, const void* address) {
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(map_smem), "l"(address)
                 : "memory");
}
template <int DIM> DEVICE void tensor_map_set_size(u32 map_smem, u32 size) {
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], %1, %2;" ::"r"(map_smem), "n"(DIM),
                 "r"(size)
                 : "memory");
}
// A warp copies its map to global memory and makes it known to the TMA unit of every block.
DEVICE void tensor_map_publish(TensorMap* to, u32 map_smem) {
    asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
                 "[%0], [%1], 128;" ::"l"(to),
                 "r"(map_smem)
                 : "memory");
}
DEVICE void tensor_map_acquire(const TensorMap* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

}  // namespace fusedops
#endif

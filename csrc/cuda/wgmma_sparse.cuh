// Products of a warpgroup in which, of each four columns of a weight, two are kept (wgmma.sp), with sums of any width.
#pragma once
#include "wgmma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace fusedops {

// A K-major tile of rows of 64 bytes with the 64-byte swizzle: groups of 8 rows follow each other after 512 bytes.
DEVICE u64 k_major_tile_64(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(512 >> 4) << 32 | 2ull << 62;
}

#define THIRD_32                                                                                                      \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "  \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FOURTH_32                                                                                                     \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "  \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LIST_64 FIRST_32
#define LIST_128 FIRST_32 ", " SECOND_32
#define LIST_256 FIRST_32 ", " SECOND_32 ", " THIRD_32 ", " FOURTH_32
#define SUMS_64(C, d) THIRTY_TWO(C, d, 0)
#define SUMS_128(C, d) THIRTY_TWO(C, d, 0), THIRTY_TWO(C, d, 32)
#define SUMS_256(C, d) SUMS_128(C, d), THIRTY_TWO(C, d, 64), THIRTY_TWO(C, d, 96)

// Kinds of elements: their size, the type of their sums, and whether those are to be taken over by float often.
struct Fp16 {
    using Sum = float;
    static constexpr int BYTES = 2;
    static constexpr bool IN_PARTS = false;
};
struct Bf16 {
    using Sum = float;
    static constexpr int BYTES = 2;
    static constexpr bool IN_PARTS = false;
};
struct Fp8 {
    using Sum = float;
    static constexpr int BYTES = 1;
    static constexpr bool IN_PARTS = true;
};
struct Int8 {
    using Sum = int;
    static constexpr int BYTES = 1;
    static constexpr bool IN_PARTS = false;
};

// d + a @ b for 64 x N, or a @ b alone where not ADD: a holds 32 bytes of each row, the kept half, b 64 bytes of each
// of N rows; both are K-major tiles in shared memory. Sums lie as those of `wgmma_bf16`. Metadata is 4 bits for each
// four columns. Of 8-bit elements lane l has 32 columns of row l / 4 + 8 * (l % 2) of the warp's 16, the second 32
// where l % 4 > 1. Of 16-bit elements it has 16 columns of row l / 4, and above them those of row l / 4 + 8; lanes with
// l % 4 / 2 == SELECTOR count, the odd one of each two for the second 16 columns.
template <class Kind, int N, int SELECTOR, bool ADD> struct WgmmaSparse;

#define WGMMA_SPARSE(KIND, N, CONSTRAINT, SHAPE, A, B, METADATA, PLACE, SCALE, MODIFIERS)                             \
    template <int SELECTOR, bool ADD> struct WgmmaSparse<KIND, N, SELECTOR, ADD> {                                    \
        static DEVICE void multiply(KIND::Sum(&d)[N / 2], u64 a, u64 b, u32 metadata) {                               \
            asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, " SCALE ", 0;\n\t"                                 \
                         "wgmma.mma_async.sp.sync.aligned.m64n" #N SHAPE " {" LIST_##N "}, " A ", " B ", " METADATA   \
                         ", " PLACE ", add" MODIFIERS ";\n\t}"                                                        \
                         : SUMS_##N(CONSTRAINT, d)                                                                    \
                         : "l"(a), "l"(b), "r"(metadata), "n"(SELECTOR), "n"((int)ADD));                              \
        }                                                                                                             \
    };
#define EVERY_KIND(N, A, B, METADATA, PLACE, SCALE)                                                                   \
    WGMMA_SPARSE(Fp16, N, "+f", "k32.f32.f16.f16", A, B, METADATA, PLACE, SCALE, ", 1, 1, 0, 0")                      \
    WGMMA_SPARSE(Bf16, N, "+f", "k32.f32.bf16.bf16", A, B, METADATA, PLACE, SCALE, ", 1, 1, 0, 0")                    \
    WGMMA_SPARSE(Fp8, N, "+f", "k64.f32.e4m3.e4m3", A, B, METADATA, PLACE, SCALE, ", 1, 1")                           \
    WGMMA_SPARSE(Int8, N, "+r", "k64.s32.s8.s8", A, B, METADATA, PLACE, SCALE, "")
EVERY_KIND(64, "%32", "%33", "%34", "%35", "%36")
EVERY_KIND(128, "%64", "%65", "%66", "%67", "%68")
EVERY_KIND(256, "%128", "%129", "%130", "%131", "%132")
#undef EVERY_KIND
#undef WGMMA_SPARSE

}  // namespace fusedops
#endif

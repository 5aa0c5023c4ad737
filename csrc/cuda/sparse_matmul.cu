// Instances of the kernels of sparse_matmul, each for one element type and tile.
#include "sparse_matmul_mma.cuh"
#include "sparse_matmul_wgmma.cuh"

using namespace fusedops;

// mma.sp: BLOCK_N rows of the weight x BLOCK_M rows of a.
#define MMA_KERNEL(NAME, T, BLOCK_N, BLOCK_M, WARP_N, WARP_M, STAGES)                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK_N / WARP_N * (BLOCK_M / WARP_M) * WARP_SIZE)                   \
        fusedops_sparse_matmul_mma_##NAME##_##BLOCK_N##x##BLOCK_M(                                                    \
            const u8* a_ptr, const u8* values_ptr, const u8* metadata_ptr, const float* scale_a_ptr,                  \
            const float* scale_b_ptr, const void* bias_ptr, void* out_ptr, long long a_row_bytes, int stride_scale_a, \
            int stride_scale_b, int M, int N, int K, int bias_type, int out_type, int activation) {                   \
        sparse_matmul_mma<SparseTile<T, BLOCK_N, BLOCK_M, WARP_N, WARP_M, STAGES>>(                                   \
            {a_ptr, values_ptr, metadata_ptr, a_row_bytes, M, N, K}, out_ptr,                                         \
            {scale_a_ptr, scale_b_ptr, bias_ptr, stride_scale_a, stride_scale_b, bias_type}, out_type, activation);   \
    }
#define MMA_KERNELS(NAME, T)                 \
    MMA_KERNEL(NAME, T, 128, 128, 64, 64, 3) \
    MMA_KERNEL(NAME, T, 128, 64, 32, 64, 4)

MMA_KERNELS(bf16, BFloat16)
MMA_KERNELS(f16, Half)
MMA_KERNELS(int8, signed char)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// wgmma.sp: 128 rows of the weight x BLOCK_M rows of a. Float8 has two sums, of which 256 rows do not fit the registers.
#define WGMMA_KERNELS(NAME, KIND)        \
    SPARSE_MATMUL_WGMMA(NAME, KIND, 64)  \
    SPARSE_MATMUL_WGMMA(NAME, KIND, 128) \
    SPARSE_MATMUL_WGMMA(NAME, KIND, 256)

WGMMA_KERNELS(bf16, Bf16)
WGMMA_KERNELS(f16, Fp16)
WGMMA_KERNELS(int8, Int8)
SPARSE_MATMUL_WGMMA(fp8, Fp8, 64)
SPARSE_MATMUL_WGMMA(fp8, Fp8, 128)
#endif

// out[M, N] = a[M, K] @ b[N, K]^T, of a only two in each four neighbours are not zero (wgmma.sp): one warpgroup,
// blocks of 64 x 64 x 128. M and N are multiples of 64, K of 128.
#include "kernels.cuh"

namespace {

constexpr int BLOCK = 64, BLOCK_K = 128, NUM_THREADS = 128;
constexpr int TILE_BYTES = BLOCK * 128;                // the kept values of a, or half of the columns of b
constexpr int STAGE_BYTES = 3 * TILE_BYTES;

}  // namespace

// values [M, K / 2] by its map; metadata [M, K / 16]: 4 bits for each four columns, the places of the two kept.
extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    gemm_sparse_bf16_wgmma(const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap b_map,
                           const u16* metadata_ptr, float* out_ptr, int M, int N, int K) {
    extern __shared__ __align__(1024) u8 smem[];
    u32 a_smem = shared_address(smem), b_smem = a_smem + TILE_BYTES, full = a_smem + STAGE_BYTES;
    int lane = threadIdx.x % 32, row = blockIdx.y * BLOCK + threadIdx.x / 32 * 16 + lane / 4;
    int block_n = blockIdx.x * BLOCK;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_fence_init();
    }
    __syncthreads();

    float acc[32] = {};
#pragma unroll 1
    for (int k = 0; k < K; k += BLOCK_K) {
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect(full, STAGE_BYTES);
            tma_load_2d(a_smem, &values_map, k / 2, blockIdx.y * BLOCK, full);
            tma_load_2d(b_smem, &b_map, k, block_n, full);
            tma_load_2d(b_smem + TILE_BYTES, &b_map, k + 64, block_n, full);
        }
        u32 metadata[4];                               // each for 32 columns of the dense a
        for (int step = 0; step < 4; step++) {
            u64 at = (u64)row * (K / 16) + k / 16 + step * 2 + lane % 2;
            metadata[step] = metadata_ptr[at] | (u32)metadata_ptr[at + 8 * (K / 16)] << 16;
        }
        mbarrier_wait(full, k / BLOCK_K & 1);
        wgmma_fence();
        for (int step = 0; step < 4; step++)
            wgmma_sparse_bf16(acc, k_major_tile(a_smem + step * 32),
                              k_major_tile(b_smem + step / 2 * TILE_BYTES + step % 2 * 64), metadata[step]);
        wgmma_commit();
        wgmma_wait<0>();
        __syncthreads();
    }
    for (int i = 0; i < 32; i++)
        out_ptr[(u64)(row + i / 2 % 2 * 8) * N + block_n + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

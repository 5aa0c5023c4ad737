// out[M, N] = a[M, K] @ b[K, N]: a goes from global memory to registers, b is MN-major (its rows are along N).
// One warpgroup, blocks of 64 x 128 x 64. M is a multiple of 64, N of 128, K of 64.
#include "kernels.cuh"

namespace {

constexpr int BLOCK_M = 64, BLOCK_N = 128, BLOCK_K = 64, NUM_THREADS = 128;
constexpr int PANEL_BYTES = BLOCK_K * 128;             // 64 columns of b
constexpr int STAGE_BYTES = 2 * PANEL_BYTES;

}  // namespace

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    gemm_registers_bf16_wgmma(const bf16* a_ptr, const __grid_constant__ TensorMap b_map, float* out_ptr, int M, int N,
                              int K) {
    extern __shared__ __align__(1024) u8 smem[];
    u32 b_smem = shared_address(smem), full = b_smem + STAGE_BYTES;
    int lane = threadIdx.x % 32, row = blockIdx.y * BLOCK_M + threadIdx.x / 32 * 16 + lane / 4;
    int block_n = blockIdx.x * BLOCK_N;
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        mbarrier_fence_init();
    }
    __syncthreads();

    float acc[64] = {};
#pragma unroll 1
    for (int k = 0; k < K; k += BLOCK_K) {
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect(full, STAGE_BYTES);
            tma_load_2d(b_smem, &b_map, block_n, k, full);
            tma_load_2d(b_smem + PANEL_BYTES, &b_map, block_n + 64, k, full);
        }
        u32 a_reg[4][4];
        for (int step = 0; step < 4; step++)
            for (int i = 0; i < 4; i++) {              // pairs of columns; rows 0 and 8, then columns 0 and 8
                int a_col = k + step * 16 + i / 2 * 8 + lane % 4 * 2;
                a_reg[step][i] = *(const u32*)(a_ptr + (u64)(row + i % 2 * 8) * K + a_col);
            }
        mbarrier_wait(full, k / BLOCK_K & 1);
        wgmma_fence();
        for (int step = 0; step < 4; step++)
            wgmma_bf16_n128(acc, a_reg[step], mn_major_tile(b_smem + step * 16 * 128, PANEL_BYTES));
        wgmma_commit();
        wgmma_wait<0>();
        __syncthreads();
    }
    for (int i = 0; i < 64; i++)
        out_ptr[(u64)(row + i / 2 % 2 * 8) * N + block_n + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

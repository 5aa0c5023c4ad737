// out[M, N] = a[M, K] @ b[N, K]^T, of a only two in each four neighbours are not zero (mma.sp): blocks of 64 x 64 x 64.
// M and N are multiples of 64, K of 64.
#include "kernels.cuh"

namespace {

constexpr int BLOCK = 64, NUM_THREADS = 128, CHUNK_BYTES = 16;
constexpr int A_ROW_BYTES = 64, B_ROW_BYTES = 128;     // 32 kept values of a, 64 of b
constexpr int A_BYTES = BLOCK * A_ROW_BYTES;

DEVICE u32 a_chunk(u32 tile_smem, int row, int chunk) {
    return tile_smem + row * A_ROW_BYTES + (chunk ^ (row >> 1 & 3)) * CHUNK_BYTES;
}
DEVICE u32 b_chunk(u32 tile_smem, int row, int chunk) {
    return tile_smem + row * B_ROW_BYTES + (chunk ^ (row & 7)) * CHUNK_BYTES;
}

}  // namespace

// values [M, K / 2]; metadata [M, K / 16]: 4 bits for each four columns, the places of the two that are kept.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    gemm_sparse_bf16_mma(const bf16* values_ptr, const u16* metadata_ptr, const bf16* b_ptr, float* out_ptr, int M,
                         int N, int K) {
    extern __shared__ __align__(128) u8 smem[];
    u32 a_smem = shared_address(smem), b_smem = a_smem + A_BYTES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
    int block_m = blockIdx.y * BLOCK, block_n = blockIdx.x * BLOCK;

    float acc[2][4][4] = {};
#pragma unroll 1
    for (int k = 0; k < K; k += BLOCK) {
        for (int i = 0; i < BLOCK; i += NUM_THREADS / 4) {
            int row = i + threadIdx.x / 4, chunk = threadIdx.x % 4;
            cp_async_16(a_chunk(a_smem, row, chunk), values_ptr + (u64)(block_m + row) * (K / 2) + k / 2 + chunk * 8,
                        true);
        }
        for (int i = 0; i < BLOCK; i += NUM_THREADS / 8) {
            int row = i + threadIdx.x / 8, chunk = threadIdx.x % 8;
            cp_async_16(b_chunk(b_smem, row, chunk), b_ptr + (u64)(block_n + row) * K + k + chunk * 8, true);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        for (int half = 0; half < 2; half++) {         // 32 columns of the dense a
            u32 a_reg[2][4], b_reg[4][4], metadata[2];
            for (int i = 0; i < 2; i++) {
                ldmatrix_x4(a_reg[i], a_chunk(a_smem, warp_m + i * 16 + lane % 16, half * 2 + lane / 16));
                u64 at = (u64)(block_m + warp_m + i * 16 + lane / 4) * (K / 16) + k / 16 + half * 2 + lane % 2;
                metadata[i] = metadata_ptr[at] | (u32)metadata_ptr[at + 8 * (K / 16)] << 16;
            }
            for (int j = 0; j < 4; j++)
                ldmatrix_x4(b_reg[j], b_chunk(b_smem, warp_n + j * 8 + lane % 8, half * 4 + lane / 8));
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) mma_sparse_bf16(acc[i][j], a_reg[i], b_reg[j], metadata[i]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int e = 0; e < 4; e++) {
                int row = block_m + warp_m + i * 16 + lane / 4 + e / 2 * 8;
                int col = block_n + warp_n + j * 8 + lane % 4 * 2 + e % 2;
                out_ptr[(u64)row * N + col] = acc[i][j][e];
            }
}

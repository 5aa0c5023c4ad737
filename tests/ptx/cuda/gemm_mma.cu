// out[M, N] = a[M, K] @ b[N, K]^T with mma.sync: blocks of 64 x 64, four warps of 32 x 32, two stages of cp.async.
// K is cut by bytes, so one kernel serves every operand type: 64 bytes a stage, 32 bytes an instruction.
#include "kernels.cuh"

namespace {

constexpr int BLOCK_M = 64, BLOCK_N = 64, NUM_THREADS = 128, NUM_STAGES = 2;
constexpr int ROW_BYTES = 64, CHUNK_BYTES = 16, CHUNKS = ROW_BYTES / CHUNK_BYTES;
constexpr int TILE_BYTES = BLOCK_M * ROW_BYTES;        // of a or b
constexpr int STAGE_BYTES = 2 * TILE_BYTES;

#if __CUDA_ARCH__ < 890
struct Bf16 {
    using In = bf16;
    using Acc = float;
    static DEVICE void mma(Acc (&c)[4], const u32 (&a)[4], const u32* b) { mma_bf16(c, a, b); }
};
struct Int8 {
    using In = s8;
    using Acc = int;
    static DEVICE void mma(Acc (&c)[4], const u32 (&a)[4], const u32* b) { mma_s8(c, a, b); }
};
#else
struct Fp8 {
    using In = e4m3;
    using Acc = float;
    static DEVICE void mma(Acc (&c)[4], const u32 (&a)[4], const u32* b) { mma_e4m3(c, a, b); }
};
#endif

// Eight rows of one chunk lie in different banks.
DEVICE u32 swizzled(u32 tile_smem, int row, int chunk) {
    return tile_smem + row * ROW_BYTES + (chunk ^ (row >> 1 & 3)) * CHUNK_BYTES;
}

// Rows from `first_row` and bytes from `first_byte`; what lies outside becomes zero.
DEVICE void load_tile(u32 tile_smem, const u8* ptr, int first_row, int num_rows, int first_byte, int num_bytes) {
    for (int i = 0; i < BLOCK_M * CHUNKS / NUM_THREADS; i++) {
        int tile_row = (i * NUM_THREADS + threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
        int row = first_row + tile_row, byte = first_byte + chunk * CHUNK_BYTES;
        bool valid = row < num_rows && byte < num_bytes;
        cp_async_16(swizzled(tile_smem, tile_row, chunk), valid ? ptr + (u64)row * num_bytes + byte : ptr, valid);
    }
}

template <class Op>
DEVICE void gemm(const typename Op::In* a_ptr, const typename Op::In* b_ptr, typename Op::Acc* out_ptr, int M, int N,
                 int K) {
    extern __shared__ __align__(128) u8 smem[];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
    int block_m = blockIdx.y * BLOCK_M, block_n = blockIdx.x * BLOCK_N;
    int row_bytes = K * sizeof(typename Op::In), num_tiles = cdiv(row_bytes, ROW_BYTES);
    auto load_stage = [&](int tile) {
        u32 a_smem = shared_address(smem) + tile % NUM_STAGES * STAGE_BYTES;
        load_tile(a_smem, (const u8*)a_ptr, block_m, M, tile * ROW_BYTES, row_bytes);
        load_tile(a_smem + TILE_BYTES, (const u8*)b_ptr, block_n, N, tile * ROW_BYTES, row_bytes);
        cp_async_commit();
    };

    typename Op::Acc acc[2][4][4] = {};
    load_stage(0);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile++) {
        if (tile + 1 < num_tiles) {
            load_stage(tile + 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        u32 a_smem = shared_address(smem) + tile % NUM_STAGES * STAGE_BYTES, b_smem = a_smem + TILE_BYTES;
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            u32 a_reg[2][4], b_reg[2][4];              // b: two tiles of 8 columns each
            for (int i = 0; i < 2; i++)
                ldmatrix_x4(a_reg[i], swizzled(a_smem, warp_m + i * 16 + lane % 16, chunk + lane / 16));
            for (int j = 0; j < 2; j++)
                ldmatrix_x4(b_reg[j],
                            swizzled(b_smem, warp_n + j * 16 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) Op::mma(acc[i][j], a_reg[i], &b_reg[j / 2][j % 2 * 2]);
        }
        __syncthreads();                               // the next load overwrites this stage
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int e = 0; e < 4; e++) {
                int row = block_m + warp_m + i * 16 + lane / 4 + e / 2 * 8;
                int col = block_n + warp_n + j * 8 + lane % 4 * 2 + e % 2;
                if (row < M && col < N) out_ptr[(u64)row * N + col] = acc[i][j][e];
            }
}

}  // namespace

#define INSTANCE(NAME, OP)                                                                                            \
    extern "C" __global__ void __launch_bounds__(NUM_THREADS)                                                         \
        NAME(const OP::In* a_ptr, const OP::In* b_ptr, OP::Acc* out_ptr, int M, int N, int K) {                       \
        gemm<OP>(a_ptr, b_ptr, out_ptr, M, N, K);                                                                     \
    }
#if __CUDA_ARCH__ < 890
INSTANCE(gemm_bf16_mma, Bf16)
INSTANCE(gemm_int8_mma, Int8)
#else
INSTANCE(gemm_fp8_mma, Fp8)
#endif

// out[M, N] = a[M, K] @ b[N, K]^T with wgmma: blocks of 128 x 64, a producer that drives TMA and two consumer
// warpgroups of 64 x 64, three stages. K is cut by bytes: 128 bytes a stage, 32 bytes an instruction.
#include "kernels.cuh"

namespace {

constexpr int BLOCK_M = 128, BLOCK_N = 64, GROUP_M = 64, NUM_STAGES = 3, NUM_CONSUMERS = 2;
constexpr int WARPGROUP = 128, NUM_THREADS = WARPGROUP * (NUM_CONSUMERS + 1);
constexpr int ROW_BYTES = 128, INSTRUCTION_BYTES = 32;
constexpr int A_BYTES = BLOCK_M * ROW_BYTES, B_BYTES = BLOCK_N * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;

struct Bf16 {
    using In = bf16;
    using Acc = float;
    static DEVICE void mma(Acc (&d)[32], u64 a, u64 b) { wgmma_bf16(d, a, b); }
};
struct Fp8 {
    using In = e4m3;
    using Acc = float;
    static DEVICE void mma(Acc (&d)[32], u64 a, u64 b) { wgmma_e4m3(d, a, b); }
};
struct Int8 {
    using In = s8;
    using Acc = int;
    static DEVICE void mma(Acc (&d)[32], u64 a, u64 b) { wgmma_s8(d, a, b); }
};

struct Pipeline {
    u32 smem;
    DEVICE u32 a(int tile) const { return smem + tile % NUM_STAGES * STAGE_BYTES; }
    DEVICE u32 b(int tile) const { return a(tile) + A_BYTES; }
    DEVICE u32 full(int tile) const { return smem + NUM_STAGES * STAGE_BYTES + tile % NUM_STAGES * 8; }
    DEVICE u32 empty(int tile) const { return full(tile) + NUM_STAGES * 8; }
    DEVICE u32 parity(int tile) const { return tile / NUM_STAGES & 1; }
};

template <class Op>
DEVICE void produce(const Pipeline& pipeline, const TensorMap* a_map, const TensorMap* b_map, int num_tiles) {
    constexpr int BLOCK_K = ROW_BYTES / sizeof(typename Op::In);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile++) {
        mbarrier_wait(pipeline.empty(tile), pipeline.parity(tile) ^ 1);
        mbarrier_arrive_expect(pipeline.full(tile), STAGE_BYTES);
        tma_load_2d(pipeline.a(tile), a_map, tile * BLOCK_K, blockIdx.y * BLOCK_M, pipeline.full(tile));
        tma_load_2d(pipeline.b(tile), b_map, tile * BLOCK_K, blockIdx.x * BLOCK_N, pipeline.full(tile));
    }
}

template <class Op>
DEVICE void consume(const Pipeline& pipeline, typename Op::Acc* out_ptr, int M, int N, int num_tiles) {
    int group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP, lane = thread % 32;
    typename Op::Acc acc[32] = {};
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile++) {
        mbarrier_wait(pipeline.full(tile), pipeline.parity(tile));
        wgmma_fence();
        for (int byte = 0; byte < ROW_BYTES; byte += INSTRUCTION_BYTES)
            Op::mma(acc, k_major_tile(pipeline.a(tile) + group * GROUP_M * ROW_BYTES + byte),
                    k_major_tile(pipeline.b(tile) + byte));
        wgmma_commit();
        wgmma_wait<0>();
        if (thread == 0) mbarrier_arrive(pipeline.empty(tile));
    }
    int first_row = blockIdx.y * BLOCK_M + group * GROUP_M + thread / 32 * 16 + lane / 4;
    for (int i = 0; i < 32; i++) {
        int row = first_row + i / 2 % 2 * 8, col = blockIdx.x * BLOCK_N + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < M && col < N) out_ptr[(u64)row * N + col] = acc[i];
    }
}

template <class Op>
DEVICE void gemm(const TensorMap* a_map, const TensorMap* b_map, typename Op::Acc* out_ptr, int M, int N, int K) {
    extern __shared__ __align__(1024) u8 smem[];
    Pipeline pipeline{shared_address(smem)};
    int num_tiles = cdiv(K * (int)sizeof(typename Op::In), ROW_BYTES);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            mbarrier_init(pipeline.full(stage), 1);
            mbarrier_init(pipeline.empty(stage), NUM_CONSUMERS);
        }
        mbarrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x / WARPGROUP == NUM_CONSUMERS) {
        registers_decrease<40>();
        if (threadIdx.x % WARPGROUP == 0) produce<Op>(pipeline, a_map, b_map, num_tiles);
    } else {
        registers_increase<232>();
        consume<Op>(pipeline, out_ptr, M, N, num_tiles);
    }
}

}  // namespace

#define INSTANCE(NAME, OP)                                                                                            \
    extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)                                                      \
        NAME(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, OP::Acc* out_ptr,      \
             int M, int N, int K) {                                                                                   \
        gemm<OP>(&a_map, &b_map, out_ptr, M, N, K);                                                                   \
    }
INSTANCE(gemm_bf16_wgmma, Bf16)
INSTANCE(gemm_fp8_wgmma, Fp8)
INSTANCE(gemm_int8_wgmma, Int8)

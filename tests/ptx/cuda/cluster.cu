// Blocks of a cluster that work together: a vector that all of them need comes once, by multicast, and a sum over
// all of them is taken from each other's shared memory. For clusters of 1, 2 or 4 blocks.
#include "kernels.cuh"

namespace {

constexpr int NUM_THREADS = 64, BLOCK_N = 64, BLOCK_K = 128, NUM_STAGES = 2;
constexpr int STAGE_BYTES = BLOCK_K * sizeof(float);

}  // namespace

// out[M] = x[M, K] @ weight[K], a row for each thread. K is a multiple of 128; the map's box is 128 / cluster size, so
// that slices of four blocks still start at multiples of 128 bytes.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    cluster_matvec(const float* x_ptr, const __grid_constant__ TensorMap weight_map, float* out_ptr, int M, int K) {
    __shared__ __align__(128) float weight_smem[NUM_STAGES][BLOCK_K];
    __shared__ u64 full[NUM_STAGES], empty[NUM_STAGES];
    u32 rank = cluster_rank(), size = cluster_size();
    int row = blockIdx.x * NUM_THREADS + threadIdx.x, num_tiles = K / BLOCK_K, slice = BLOCK_K / size;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            mbarrier_init(shared_address(&full[stage]), 1);
            mbarrier_init(shared_address(&empty[stage]), size);
        }
        mbarrier_fence_init();
    }
    cluster_sync();

    // Every block loads its slice of the tile into all blocks, once all of them have emptied the stage.
    auto load = [&](int tile) {
        int stage = tile % NUM_STAGES;
        mbarrier_wait_cluster(shared_address(&empty[stage]), (tile / NUM_STAGES & 1) ^ 1);
        mbarrier_arrive_expect(shared_address(&full[stage]), STAGE_BYTES);
        tma_load_1d_multicast(shared_address(&weight_smem[stage][rank * slice]), &weight_map,
                              tile * BLOCK_K + rank * slice, shared_address(&full[stage]), (u16)((1 << size) - 1));
    };
    float sum = 0;
    if (threadIdx.x == 0) load(0);
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile++) {
        int stage = tile % NUM_STAGES;
        if (threadIdx.x == 0 && tile + 1 < num_tiles) load(tile + 1);
        mbarrier_wait(shared_address(&full[stage]), tile / NUM_STAGES & 1);
        if (row < M)
            for (int k = 0; k < BLOCK_K; k++) sum += x_ptr[(u64)row * K + tile * BLOCK_K + k] * weight_smem[stage][k];
        __syncthreads();
        if (threadIdx.x < size) mbarrier_arrive_remote(shared_address(&empty[stage]), threadIdx.x);
    }
    if (row < M) out_ptr[row] = sum;
    cluster_sync();                                    // nobody leaves while others may still arrive here
}

// out[N] = sum of the rows of x[M, N]: a cluster for each 64 columns, its blocks share the rows and then the columns.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    cluster_column_sum(const float* x_ptr, float* out_ptr, int M, int N) {
    __shared__ float partial_smem[BLOCK_N];
    u32 rank = cluster_rank(), size = cluster_size();
    int first_col = blockIdx.x / size * BLOCK_N, col = first_col + threadIdx.x;
    float sum = 0;
    if (col < N)
        for (int row = rank; row < M; row += size) sum += x_ptr[(u64)row * N + col];
    partial_smem[threadIdx.x] = sum;
    cluster_sync();
    int mine = rank * (BLOCK_N / size) + threadIdx.x;
    if (threadIdx.x < BLOCK_N / size && first_col + mine < N) {
        float total = 0;
        for (u32 other = 0; other < size; other++) total += load_remote(shared_address(&partial_smem[mine]), other);
        out_ptr[first_col + mine] = total;
    }
    cluster_sync();                                    // nobody leaves while others may still read here
}

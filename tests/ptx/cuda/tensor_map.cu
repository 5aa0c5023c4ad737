// Tensor maps made on the device: each block has rows of its own length and clips at their end by its own map.
#include "kernels.cuh"

namespace {

constexpr int BLOCK_M = 32, BLOCK_N = 32, NUM_THREADS = 32, TILE_BYTES = BLOCK_M * BLOCK_N * sizeof(float);

// The map of `rows` rows from `address`, otherwise like `like`; by one warp.
DEVICE void make_map(TensorMap* out_map, TensorMap& map_smem, const TensorMap& like, const float* address, int rows) {
    if (threadIdx.x < 16) map_smem.opaque[threadIdx.x] = like.opaque[threadIdx.x];
    __syncwarp();
    if (threadIdx.x == 0) {
        tensor_map_set_address(shared_address(&map_smem), address);
        tensor_map_set_size<1>(shared_address(&map_smem), rows);
    }
    __syncwarp();
    tensor_map_publish(out_map, shared_address(&map_smem));
    tensor_map_acquire(out_map);
}

}  // namespace

// out = factor * x for rows offsets[g] to offsets[g + 1] of x[rows, N], one block for each g. like: a map of x.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    grouped_scale(const __grid_constant__ TensorMap like, const float* x_ptr, const int* offsets_ptr, float* out_ptr,
                  TensorMap* maps_ptr, int N, float factor) {
    __shared__ __align__(128) float tile_smem[BLOCK_M * BLOCK_N];
    __shared__ __align__(128) TensorMap map_smem[2];
    __shared__ u64 full;
    int first = offsets_ptr[blockIdx.x], rows = offsets_ptr[blockIdx.x + 1] - first;
    TensorMap *x_map = maps_ptr + 2 * blockIdx.x, *out_map = x_map + 1;
    make_map(x_map, map_smem[0], like, x_ptr + (u64)first * N, rows);
    make_map(out_map, map_smem[1], like, out_ptr + (u64)first * N, rows);
    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(&full), 1);
        mbarrier_fence_init();
    }
    __syncwarp();
    u32 parity = 0;
#pragma unroll 1
    for (int row = 0; row < rows; row += BLOCK_M)
#pragma unroll 1
        for (int col = 0; col < N; col += BLOCK_N, parity ^= 1) {
            if (threadIdx.x == 0) {
                mbarrier_arrive_expect(shared_address(&full), TILE_BYTES);
                tma_load_2d(shared_address(tile_smem), x_map, col, row, shared_address(&full));
            }
            mbarrier_wait(shared_address(&full), parity);
#pragma unroll 1
            for (int i = threadIdx.x; i < BLOCK_M * BLOCK_N; i += NUM_THREADS) tile_smem[i] *= factor;
            fence_async_proxy();
            __syncwarp();
            if (threadIdx.x == 0) {
                tma_store_2d(out_map, col, row, shared_address(tile_smem));
                bulk_commit();
                bulk_wait_read<0>();
            }
            __syncwarp();
        }
    if (threadIdx.x == 0) bulk_wait<0>();
}

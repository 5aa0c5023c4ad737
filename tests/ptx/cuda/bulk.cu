// Bulk copies without a tensor map: in by mbarrier, out in bulk groups, as a store and as a sum.
#include "kernels.cuh"

namespace {

constexpr int NUM_THREADS = 64, BLOCK = 256;

}  // namespace

// scaled = alpha * x, and out += alpha * x, for n floats; n is a multiple of 4.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    bulk_axpy(const float* x_ptr, float* scaled_ptr, float* out_ptr, int n, float alpha) {
    __shared__ __align__(128) float tile_smem[BLOCK];
    __shared__ u64 full;
    int first = blockIdx.x * BLOCK, count = min(BLOCK, n - first);
    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(&full), 1);
        mbarrier_fence_init();
        mbarrier_arrive_expect(shared_address(&full), count * (int)sizeof(float));
        bulk_load(shared_address(tile_smem), x_ptr + first, count * sizeof(float), shared_address(&full));
    }
    __syncthreads();
    mbarrier_wait(shared_address(&full), 0);
    for (int i = threadIdx.x; i < count; i += NUM_THREADS) tile_smem[i] *= alpha;
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        bulk_store(scaled_ptr + first, shared_address(tile_smem), count * sizeof(float));
        bulk_add_f32(out_ptr + first, shared_address(tile_smem), count * sizeof(float));
        bulk_commit();
        bulk_wait<0>();
    }
}

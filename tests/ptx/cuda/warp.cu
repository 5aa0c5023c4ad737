// Work inside a warp where not all lanes take part, and between warps by named barriers.
#include "kernels.cuh"

namespace {

constexpr u32 ALL_LANES = 0xffffffff;

DEVICE float sum_of_lanes(u32 mask, float value, int count) {   // of the lanes below `count`; right in lane 0
    int lane = lane_id();
    for (int offset = 16; offset > 0; offset /= 2) {
        float other = __shfl_sync(mask, value, min(lane + offset, count - 1));   // never of a lane outside of the mask
        if (lane + offset < count) value += other;
    }
    return value;
}

}  // namespace

// out[row] = sum of the first lengths[row] (0 to 32) of the 32 values of a row of x; a warp for each row.
extern "C" __global__ void ragged_row_sum(const float* x_ptr, const int* lengths_ptr, float* out_ptr, int num_rows) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = lane_id();
    if (row >= num_rows) return;
    int length = lengths_ptr[row];
    u32 mask = __ballot_sync(ALL_LANES, lane < length);
    if (lane < length) {                               // the other lanes are not in the mask and do not come here
        float sum = sum_of_lanes(mask, x_ptr[row * 32 + lane], length);
        if (lane == 0) out_ptr[row] = sum;
    } else if (length == 0 && lane == 0) {
        out_ptr[row] = 0;
    }
}

// out[key] += value for n pairs: lanes of a warp with the same key add up first, and one of them speaks for all.
extern "C" __global__ void sum_by_key(const int* keys_ptr, const int* values_ptr, int* out_ptr, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = lane_id();
    if (i >= n) return;
    u32 peers = __match_any_sync(__activemask(), keys_ptr[i]);
    int sum = __reduce_add_sync(peers, values_ptr[i]);
    if (lane == __ffs(peers) - 1) atomicAdd(&out_ptr[keys_ptr[i]], sum);
}

// out[32] = sum of the rows of x[M, 32]: warp 0 brings rows, warp 1 adds them, with two rows of shared memory.
extern "C" __global__ void __launch_bounds__(64) ping_pong_sum(const float* x_ptr, float* out_ptr, int M) {
    constexpr int FULL = 1, EMPTY = 3;                 // and the barrier after each, for odd rows
    __shared__ float row_smem[2][32];
    int lane = lane_id();
    if (threadIdx.x < 32) {
#pragma unroll 1
        for (int row = 0; row < M; row += 2) {
            if (row > 0) named_barrier_sync<EMPTY, 64>();
            row_smem[0][lane] = x_ptr[row * 32 + lane];
            named_barrier_arrive<FULL, 64>();
            if (row > 0) named_barrier_sync<EMPTY + 1, 64>();
            row_smem[1][lane] = row + 1 < M ? x_ptr[(row + 1) * 32 + lane] : 0;
            named_barrier_arrive<FULL + 1, 64>();
        }
    } else {
        float sum = 0;
#pragma unroll 1
        for (int row = 0; row < M; row += 2) {
            named_barrier_sync<FULL, 64>();
            sum += row_smem[0][lane];
            if (row + 2 < M) named_barrier_arrive<EMPTY, 64>();
            named_barrier_sync<FULL + 1, 64>();
            sum += row_smem[1][lane];
            if (row + 2 < M) named_barrier_arrive<EMPTY + 1, 64>();
        }
        out_ptr[lane] = sum;
    }
}

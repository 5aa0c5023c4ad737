// Work that blocks share through global memory: counters, and a sum that the last block takes.
#include "kernels.cuh"

namespace {

constexpr int NUM_BINS = 64, TILE = 16, NUM_THREADS = TILE * TILE;

}  // namespace

// out[bin] += how often a bin (0 to 63) occurs in n bytes; each block counts in shared memory first.
extern "C" __global__ void histogram(const u8* x_ptr, u32* out_ptr, int n) {
    __shared__ u32 count_smem[NUM_BINS];
    for (int bin = threadIdx.x; bin < NUM_BINS; bin += blockDim.x) count_smem[bin] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        atomicAdd(&count_smem[x_ptr[i]], 1u);
    __syncthreads();
    for (int bin = threadIdx.x; bin < NUM_BINS; bin += blockDim.x) atomicAdd(&out_ptr[bin], count_smem[bin]);
}

// out = factor * x for n floats, four at a time; n is a multiple of 4.
extern "C" __global__ void scale_vectors(const float4* x_ptr, float4* out_ptr, int n, float factor) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n / 4) return;
    float4 x = x_ptr[i];
    out_ptr[i] = float4{x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}

// out[M, N] = a[M, K] @ b[K, N]: the blocks along z have K in parts; whoever comes last adds the parts in their order.
// partial [parts, M, N]; semaphore [tiles] is zero before and after.
extern "C" __global__ void __launch_bounds__(NUM_THREADS)
    gemm_split_k(const float* a_ptr, const float* b_ptr, float* out_ptr, float* partial_ptr, u32* semaphore_ptr, int M,
                 int N, int K) {
    __shared__ float a_smem[TILE][TILE], b_smem[TILE][TILE];
    __shared__ bool last;
    int col = blockIdx.x * TILE + threadIdx.x, row = blockIdx.y * TILE + threadIdx.y;
    int part_k = cdiv(cdiv(K, TILE), (int)gridDim.z) * TILE, begin = blockIdx.z * part_k, end = min(K, begin + part_k);
    float sum = 0;
#pragma unroll 1
    for (int k = begin; k < end; k += TILE) {
        int a_col = k + threadIdx.x, b_row = k + threadIdx.y;
        a_smem[threadIdx.y][threadIdx.x] = row < M && a_col < end ? a_ptr[row * K + a_col] : 0;
        b_smem[threadIdx.y][threadIdx.x] = b_row < end && col < N ? b_ptr[b_row * N + col] : 0;
        __syncthreads();
        for (int i = 0; i < TILE; i++) sum += a_smem[threadIdx.y][i] * b_smem[i][threadIdx.x];
        __syncthreads();
    }
    bool inside = row < M && col < N;
    if (inside) partial_ptr[(u64)blockIdx.z * M * N + row * N + col] = sum;

    u32* semaphore = semaphore_ptr + blockIdx.y * gridDim.x + blockIdx.x;
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        last = atomic_add_release_acquire(semaphore, 1) == gridDim.z - 1;
        if (last) *semaphore = 0;
    }
    __syncthreads();
    if (!last || !inside) return;
    float total = 0;
    for (int part = 0; part < gridDim.z; part++) total += partial_ptr[(u64)part * M * N + row * N + col];
    out_ptr[row * N + col] = total;
}

// What every kernel needs: integer helpers, storage types and their conversion to float, 16-byte accesses, reductions.
// No header of CUDA, torch or Python is included, so nvcc and NVRTC compile this file alike.
#pragma once

namespace fusedops {

constexpr int WARP_SIZE = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

template <typename Integer>
__host__ __device__ constexpr Integer cdiv(Integer a, Integer b) {
    return (a + b - 1) / b;
}

// Storage types: bits in memory. Arithmetic is done in float.
struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(Half value) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
    return out;
}

// A bfloat16 is the upper half of the float of the same value.
__device__ inline float to_float(BFloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }

// from_float<T> rounds to nearest, ties to even.
template <typename T>
__device__ inline T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
    return value;
}

template <>
__device__ inline Half from_float<Half>(float value) {
    Half out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    return out;
}

template <>
__device__ inline BFloat16 from_float<BFloat16>(float value) {
    BFloat16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
    return out;
}

// Sixteen bytes at once: one LDG.E.128 or STG.E.128. The address must be a multiple of 16.
template <typename T>
struct alignas(16) Vector16 {
    static constexpr int SIZE = 16 / sizeof(T);
    T element[SIZE];
};

template <typename T>
__device__ inline Vector16<T> load_16(const T* pointer) {
    return *reinterpret_cast<const Vector16<T>*>(pointer);
}

template <typename T>
__device__ inline void store_16(T* pointer, const Vector16<T>& value) {
    *reinterpret_cast<Vector16<T>*>(pointer) = value;
}

// Reductions: every thread gets the result, and the order of the sum depends on the size of the block alone.
struct Sum {
    __device__ static float identity() { return 0.0f; }
    __device__ static float combine(float a, float b) { return a + b; }
};

struct Max {
    __device__ static float identity() { return __uint_as_float(0xff800000u); }  // minus infinity
    // The comparison is written so that a NaN on either side is the result, as in torch.
    __device__ static float combine(float a, float b) { return (a > b || a != a) ? a : b; }
};

template <typename Operation>
__device__ inline float warp_reduce(float value) {
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        value = Operation::combine(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    return value;
}

// `partial_smem` holds NUM_WARPS floats. It may be used again as soon as the call returns.
template <typename Operation, int NUM_WARPS>
__device__ inline float block_reduce(float value, float* partial_smem) {
    static_assert(NUM_WARPS >= 1 && NUM_WARPS <= WARP_SIZE, "one warp combines the partial results");
    const int lane = threadIdx.x % WARP_SIZE;
    value = warp_reduce<Operation>(value);
    if (lane == 0) {
        partial_smem[threadIdx.x / WARP_SIZE] = value;
    }
    __syncthreads();
    value = warp_reduce<Operation>(lane < NUM_WARPS ? partial_smem[lane] : Operation::identity());
    __syncthreads();
    return value;
}

}  // namespace fusedops

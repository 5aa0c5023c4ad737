// What becomes of the sums of sparse_matmul, in float: scales, bias, activation, one rounding. Both kernels use it.
#pragma once
#include "common.cuh"

namespace fusedops {

enum OutType : int { OUT_FLOAT32, OUT_FLOAT16, OUT_BFLOAT16 };
enum Activation : int { ACTIVATION_NONE, ACTIVATION_RELU, ACTIVATION_SILU, ACTIVATION_GELU, ACTIVATION_GELU_TANH };

// Within two units in the last place over the whole range.
__device__ inline float divide(float a, float b) {
    float out;
    asm("div.full.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// Two values rounded and packed, the first in the low half.
__device__ inline unsigned pack_two(float first, float second, int out_type) {
    unsigned out;
    if (out_type == OUT_FLOAT16) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    }
    return out;
}

// One rounded value of any type to `pointer[at]`.
__device__ inline void store_rounded(void* pointer, long long at, float value, int out_type) {
    if (out_type == OUT_FLOAT32) {
        static_cast<float*>(pointer)[at] = value;
    } else if (out_type == OUT_FLOAT16) {
        static_cast<Half*>(pointer)[at] = from_float<Half>(value);
    } else {
        static_cast<BFloat16*>(pointer)[at] = from_float<BFloat16>(value);
    }
}

// The choice is made once for all values. Where exp overflows, a quotient is the zero that it tends to.
template <int COUNT>
__device__ inline void activate(float (&x)[COUNT], int activation) {
    if (activation == ACTIVATION_RELU) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i];  // a NaN stays
    } else if (activation == ACTIVATION_SILU) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) x[i] = divide(x[i], 1.0f + __expf(-x[i]));
    } else if (activation == ACTIVATION_GELU) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.7071067811865476f));
    } else if (activation == ACTIVATION_GELU_TANH) {
        // x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with 2 sqrt(2 / pi) = 1.59...
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            x[i] = divide(x[i], 1.0f + __expf(-1.5957691216057308f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    }
}

// Of a column of the result, a row of the weight.
struct Column {
    float scale, bias;
};

// Pointers may be null; of a scale the stride is 0 where one number is for all, else 1.
struct Epilogue {
    const float* scale_a_ptr;
    const float* scale_b_ptr;
    const void* bias_ptr;
    int stride_scale_a, stride_scale_b, bias_type;

    __device__ float row_scale(int m) const {
        return scale_a_ptr == nullptr ? 1.0f : scale_a_ptr[(long long)m * stride_scale_a];
    }
    // Without a bias -0.0 is added, which leaves every product as it is.
    __device__ Column column(int n) const {
        Column out{1.0f, -0.0f};
        if (scale_b_ptr != nullptr) out.scale = scale_b_ptr[(long long)n * stride_scale_b];
        if (bias_ptr != nullptr) {
            if (bias_type == OUT_FLOAT32) out.bias = static_cast<const float*>(bias_ptr)[n];
            if (bias_type == OUT_FLOAT16) out.bias = to_float(static_cast<const Half*>(bias_ptr)[n]);
            if (bias_type == OUT_BFLOAT16) out.bias = to_float(static_cast<const BFloat16*>(bias_ptr)[n]);
        }
        return out;
    }
    static __device__ float scaled(float sum, float row_scale, const Column& column) {
        return __fmaf_rn(__fmul_rn(sum, row_scale), column.scale, column.bias);
    }
};

}  // namespace fusedops

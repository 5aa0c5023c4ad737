"""What both CUDA kernels are told of scales, bias, activation and the result's dtype."""

import ctypes
from dataclasses import dataclass

import torch

# As the enumerations of csrc/cuda/sparse_matmul_epilogue.cuh have them.
FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATION_CODES = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


@dataclass(frozen=True)
class Epilogue:
    """Arguments of a launch.

    Attributes:
        tensors: scale_a, scale_b and bias, contiguous or None.
        strides: Of the scales: 0 where one number is for all, else 1.
        codes: The bias's type, the result's, and the activation.
    """

    tensors: tuple
    strides: tuple
    codes: tuple

    @classmethod
    def of(cls, scale_a, scale_b, bias, out_dtype, activation):
        """From the operator's arguments."""
        tensors = tuple(None if x is None else x.contiguous() for x in (scale_a, scale_b, bias))
        strides = tuple(int(scale is not None and scale.numel() > 1) for scale in (scale_a, scale_b))
        bias_type = FLOAT_CODES[out_dtype if bias is None else bias.dtype]
        codes = bias_type, FLOAT_CODES[out_dtype], ACTIVATION_CODES[activation]
        return cls(tensors, *(tuple(map(ctypes.c_int32, numbers)) for numbers in (strides, codes)))

"""Launches of the kernels without tensors, from which tests make machine code."""

import triton.language as tl

from fusedops._core.device import MIN_FP8_CAPABILITY
from fusedops._core.launch import KernelExample
from fusedops.ops.scaled_matmul._triton import hopper_launch
from fusedops.ops.scaled_matmul._triton.portable import _scaled_matmul_kernel
from fusedops.ops.scaled_matmul._triton.small import (
    _scaled_matmul_combine_kernel,
    _scaled_matmul_small_kernel,
    combine_block,
)

PROMPT, DECODE, DECODE_SPLIT = (4096, 4096, 4096), (16, 28672, 4096), (16, 4096, 4096)  # rows, columns, depth
ROWS = {"ACTIVATION": "none", "GATED": False, "SCALE_A": "row", "SCALE_B": "row"}
BLOCKS = {"ACTIVATION": "none", "GATED": False, "SCALE_A": "block", "SCALE_B": "block"}
PAIRS = {"ACTIVATION": "silu", "GATED": True}  # of a gate and an up projection


def examples(default, dtype, target):
    """Layers of Llama 3 8B, prompt and decoding step; dtype is the result's."""
    pairs = PAIRS if dtype == "bf16" else {}
    blocks = ROWS | pairs | {"BLOCK_N": combine_block(bool(pairs))}
    combine = _described(_scaled_matmul_combine_kernel, dtype, "i8", blocks, 4, 1)
    if dtype == "fp16":  # bf16's instructions but for the last one, which every kernel has
        yield combine
        return
    yield _example(default, dtype, target, "i8", DECODE, ROWS | pairs)
    if dtype == "fp32":
        return
    fp8 = "fp8e4nv" if target.capability >= MIN_FP8_CAPABILITY else "u8"
    yield _example(default, dtype, target, fp8, DECODE_SPLIT, BLOCKS)
    yield combine
    if target.arch == hopper_launch.ARCH:
        yield hopper_launch.example(dtype, target, "i8", PROMPT, ROWS | {"ACTIVATION": "gelu"}, full=True)
        yield hopper_launch.example(dtype, target, fp8, PROMPT, ROWS | PAIRS, full=True)
        yield hopper_launch.example(dtype, target, fp8, PROMPT, BLOCKS, full=False)
    else:
        yield _example(default, dtype, target, "i8", PROMPT, ROWS | PAIRS)
        yield _example(default, dtype, target, fp8, PROMPT, BLOCKS | {"ACTIVATION": "gelu"})


def _example(default, dtype, target, code, shape, kinds):
    """A launch on codes that are a multiple of every tile."""
    tile = default(*shape, code == "u8" or "block" in kinds.values(), target)
    small = tile.kernel == "small"
    constants = {
        **kinds, "EVEN_K": True, "EXPAND": code == "u8", "ACC": tl.int32 if code == "i8" else tl.float32,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    if not small:
        constants["GROUP_M"] = 8
    elif tile.num_splits == 1:
        constants["parts_ptr"] = None
    kernel = _scaled_matmul_small_kernel if small else _scaled_matmul_kernel
    return _described(kernel, dtype, code, constants, tile.num_warps, tile.num_stages)


def _described(kernel, dtype, code, constants, num_warps, num_stages):
    """With an activation also with bias and residual; strides are multiples of 16, of scales that are not blocks 0."""
    pointers = {"a_ptr": code, "b_ptr": code, "parts_ptr": "i32" if code == "i8" else "fp32", "scale_a_ptr": "fp32"}
    pointers |= {"scale_b_ptr": "fp32", "bias_ptr": dtype, "residual_ptr": dtype, "out_ptr": dtype}
    constants = dict(constants)
    if constants["ACTIVATION"] == "none":
        constants |= {"bias_ptr": None, "residual_ptr": None}
    types, divisible = {}, []
    for name in kernel.arg_names:
        if name not in constants:
            types[name] = f"*{pointers[name]}" if name in pointers else "i32"
            divisible += [] if name in ("M", "num_splits") else [name]
    halved = kernel is _scaled_matmul_small_kernel and constants["GATED"]  # 8 bytes of results for each thread
    return KernelExample(
        kernel, types, constants, tuple(divisible), num_warps=num_warps, num_stages=num_stages, wide_access=not halved
    )  # fmt: skip

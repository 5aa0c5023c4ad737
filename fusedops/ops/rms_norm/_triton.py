"""RMS norm on the GPU: one program takes whole rows, so nothing leaves it between the sum and the product."""

import torch
import triton
import triton.language as tl

from fusedops._core import codes, rows
from fusedops._core.device import limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div
from fusedops._core.relaunch import Relauncher
from fusedops._core.tl import encoded, inverse_of, largest_bits, row_offsets, scale_of, size_bits


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, h_ptr,
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    stride_out_outer, stride_out_inner, stride_h_outer, stride_h_inner,
    M, N, inner, eps, weight_offset,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M rows; rows longer than BLOCK_N are read twice, the second time from cache."""
    dtype = out_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[:, None]
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)[:, None]
    out_rows = out_ptr + row_offsets(offs_m, inner, stride_out_outer, stride_out_inner)[:, None]
    h_rows = x_rows
    if HAS_RESIDUAL:
        residual_rows = residual_ptr + row_offsets(offs_m, inner, stride_residual_outer, stride_residual_inner)[:, None]
        h_rows = h_ptr + row_offsets(offs_m, inner, stride_h_outer, stride_h_inner)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]

    if ONE_BLOCK:
        mask = mask_m & (offs_n < N)
        x = tl.load(x_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            rounded = (x + tl.load(residual_rows + offs_n, mask=mask, other=0.0).to(tl.float32)).to(dtype)
            tl.store(h_rows + offs_n, rounded, mask=mask)
            x = rounded.to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)
        y = x * rstd[:, None]
        if ROUND_FIRST:
            y = y.to(dtype).to(tl.float32)
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) + weight_offset
        tl.store(out_rows + offs_n, y.to(dtype), mask=mask)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = mask_m & (start + offs_n < N)
            x = tl.load(x_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                rounded = (x + tl.load(residual_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)).to(dtype)
                tl.store(h_rows + start + offs_n, rounded, mask=mask)
                x = rounded.to(tl.float32)
            squares += x * x
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / N + eps)
        if HAS_RESIDUAL:
            tl.debug_barrier()  # h is read back below, possibly by other threads of this program
        for start in range(0, N, BLOCK_N):
            mask = mask_m & (start + offs_n < N)
            y = tl.load(h_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
            if ROUND_FIRST:
                y = y.to(dtype).to(tl.float32)
            if HAS_WEIGHT:
                scale = tl.load(weight_ptr + start + offs_n, mask=start + offs_n < N, other=0.0).to(tl.float32)
                y *= scale + weight_offset
            tl.store(out_rows + start + offs_n, y.to(dtype), mask=mask)


@triton.jit
def _normalised(
    x, rstd, weight_ptr, offs_n, N, weight_offset,
    dtype: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """A tile of the result in `dtype`, float32 again."""
    y = x * rstd[:, None]
    if ROUND_FIRST:
        y = y.to(dtype).to(tl.float32)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) + weight_offset
    return y.to(dtype).to(tl.float32)


@triton.jit
def _rms_norm_quantized_kernel(
    x_ptr, residual_ptr, weight_ptr, values_ptr, scale_ptr, h_ptr,
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner, M, N, inner, eps, weight_offset,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND_FIRST: tl.constexpr, CODE: tl.constexpr,
    BY_INTEGERS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M rows and gives their codes; rows longer than BLOCK_N are read three times."""
    dtype = x_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_m = (offs_m < M)[:, None]
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)[:, None]
    values_rows = values_ptr + (offs_m * N)[:, None]
    h_rows = x_rows
    if HAS_RESIDUAL:
        residual_rows = residual_ptr + row_offsets(offs_m, inner, stride_residual_outer, stride_residual_inner)[:, None]
        h_rows = h_ptr + (offs_m * N)[:, None]

    if ONE_BLOCK:
        mask = mask_m & (offs_n < N)
        x = tl.load(x_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            rounded = (x + tl.load(residual_rows + offs_n, mask=mask, other=0.0).to(tl.float32)).to(dtype)
            tl.store(h_rows + offs_n, rounded, mask=mask)
            x = rounded.to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)
        y = _normalised(x, rstd, weight_ptr, offs_n, N, weight_offset, dtype, HAS_WEIGHT, ROUND_FIRST)
        scale = scale_of(largest_bits(y, 1), CODE)
        tl.store(values_rows + offs_n, encoded(y * inverse_of(scale)[:, None], CODE, -127.0, BY_INTEGERS), mask=mask)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = mask_m & (start + offs_n < N)
            x = tl.load(x_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                rounded = (x + tl.load(residual_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)).to(dtype)
                tl.store(h_rows + start + offs_n, rounded, mask=mask)
                x = rounded.to(tl.float32)
            squares += x * x
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / N + eps)
        if HAS_RESIDUAL:
            tl.debug_barrier()  # h is read back below, possibly by other threads of this program
        tops = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for start in range(0, N, BLOCK_N):
            mask = mask_m & (start + offs_n < N)
            x = tl.load(h_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
            y = _normalised(x, rstd, weight_ptr, start + offs_n, N, weight_offset, dtype, HAS_WEIGHT, ROUND_FIRST)
            tops = tl.maximum(tops, size_bits(y))
        scale = scale_of(tl.max(tops, 1), CODE)
        inverse = inverse_of(scale)[:, None]
        for start in range(0, N, BLOCK_N):
            mask = mask_m & (start + offs_n < N)
            x = tl.load(h_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
            y = _normalised(x, rstd, weight_ptr, start + offs_n, N, weight_offset, dtype, HAS_WEIGHT, ROUND_FIRST)
            stored = encoded(y * inverse, CODE, -127.0, BY_INTEGERS)
            tl.store(values_rows + start + offs_n, stored, mask=mask)
    tl.store(scale_ptr + offs_m, scale, mask=offs_m < M)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, grad_h_ptr, dx_ptr, dweight_ptr,
    stride_grad_outer, stride_grad_inner, stride_x_outer, stride_x_inner,
    stride_grad_h_outer, stride_grad_h_inner,
    M, N, inner, eps, weight_offset,
    HAS_WEIGHT: tl.constexpr, HAS_GRAD_H: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program takes every num_programs-th tile of rows: dx, and its own float32 row of partial weight gradients."""
    num_programs = tl.num_programs(0)
    first = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    if HAS_WEIGHT:
        partial_row = dweight_ptr + first * N
    dtype = dx_ptr.dtype.element_ty
    if ONE_BLOCK:
        scale = tl.full([1, BLOCK_N], 1.0, tl.float32)
        if HAS_WEIGHT:
            scale = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) + weight_offset
        partial = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(first, tl.cdiv(M, BLOCK_M), num_programs):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = (offs_m < M)[:, None]
        grad_rows = grad_ptr + row_offsets(offs_m, inner, stride_grad_outer, stride_grad_inner)[:, None]
        x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)[:, None]
        if HAS_GRAD_H:
            grad_h_rows = grad_h_ptr + row_offsets(offs_m, inner, stride_grad_h_outer, stride_grad_h_inner)[:, None]
        dx_rows = dx_ptr + (offs_m * N)[:, None]
        if ONE_BLOCK:
            mask = mask_m & (offs_n < N)
            x = tl.load(x_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
            # a row beyond M adds nothing to the partial sums, not even 0 / 0 where eps is 0
            rstd = tl.where(mask_m, 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)[:, None], 0.0)
            along = tl.sum(grad * scale * x, axis=1)[:, None] / N
            dx = rstd * (grad * scale - x * (rstd * rstd * along))
            if HAS_GRAD_H:
                dx += tl.load(grad_h_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_rows + offs_n, dx.to(dtype), mask=mask)
            if HAS_WEIGHT:
                partial += grad * x * rstd
        else:
            squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, N, BLOCK_N):
                mask = mask_m & (start + offs_n < N)
                x = tl.load(x_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                grad = tl.load(grad_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                if HAS_WEIGHT:
                    scale = tl.load(weight_ptr + start + offs_n, mask=start + offs_n < N, other=0.0).to(tl.float32)
                    grad *= scale + weight_offset
                squares += x * x
                products += grad * x
            rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / N + eps)[:, None]
            along = tl.sum(products, axis=1)[:, None] / N
            for start in range(0, N, BLOCK_N):
                mask = mask_m & (start + offs_n < N)
                x = tl.load(x_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                grad = tl.load(grad_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                weighted = grad
                if HAS_WEIGHT:
                    mask_n = start + offs_n < N
                    weighted = grad * (
                        tl.load(weight_ptr + start + offs_n, mask=mask_n, other=0.0).to(tl.float32) + weight_offset
                    )
                    # only this program touches its row, and BLOCK_M is 1 here: read, add, write needs no atomics
                    before = tl.load(partial_row + start + offs_n, mask=mask_n & (tile > first), other=0.0)
                    tl.store(partial_row + start + offs_n, before + grad * x * rstd, mask=mask_n)
                dx = rstd * (weighted - x * (rstd * rstd * along))
                if HAS_GRAD_H:
                    dx += tl.load(grad_h_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_rows + start + offs_n, dx.to(dtype), mask=mask)
    if ONE_BLOCK and HAS_WEIGHT:
        tl.store(partial_row + offs_n, tl.sum(partial, axis=0)[None, :], mask=offs_n < N)


# Backward keeps four float32 values an element in registers, forward two: half the row fits.
MAX_BLOCK_BACKWARD = rows.MAX_BLOCK // 4
_run, _run_quantized = Relauncher(_rms_norm_kernel), Relauncher(_rms_norm_quantized_kernel)

_ASKED = ("dtype", "weight", "residual", "rounding")
FORWARD = rows.tunable("rms_norm", __file__, _ASKED)
QUANTIZED = rows.tunable("rms_norm_quantized", __file__, (*_ASKED, "codes"))
BACKWARD = rows.tunable("rms_norm_backward", __file__, ("dtype", "weight", "grad_h"), MAX_BLOCK_BACKWARD)


def config(op, device_limits, x, *args):
    """The configuration of one call."""
    if op == "rms_norm_backward":
        return _tile(BACKWARD, device_limits, x, args[1], args[-1] is not None)
    residual = op.startswith("add_")
    weight, _, _, *also = args[residual:]
    return _tile(QUANTIZED if len(also) > 1 else FORWARD, device_limits, x, weight, residual, *also)


def _tile(tunable, device_limits, x, weight, *also):
    """The tile of one kernel."""
    return tunable.choose(device_limits, x.shape[-1:], (x.dtype, None if weight is None else weight.dtype, *also))


def rms_norm(x, weight, eps, weight_offset, rounding, out=None):
    """Launch the kernel without a residual."""
    if out is None:
        out = x.new_empty(x.shape)
    _launch(x, None, weight, out, None, eps, weight_offset, rounding)
    return out


def add_rms_norm(x, residual, weight, eps, weight_offset, rounding):
    """Launch the kernel with a residual."""
    out, h = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, residual, weight, out, h, eps, weight_offset, rounding)
    return out, h


def add_rms_norm_(x, residual, weight, eps, weight_offset, rounding):
    """Launch the kernel with x as out and residual as h: each program reads a row before it writes it."""
    _launch(x, residual, weight, x, residual, eps, weight_offset, rounding)


def _launch(x, residual, weight, out, h, eps, weight_offset, rounding):
    n = x.shape[-1]
    if x.numel() == 0:
        return
    tensors = (x, out) if residual is None else (x, out, residual, h)
    layout = rows.collapse(*tensors)
    if layout is None:
        _launch_copied(x, residual, weight, out, h, eps, weight_offset, rounding)
        return
    num_rows, inner, strides = layout
    x_strides, out_strides = strides[0:2], strides[2:4]
    residual_strides, h_strides = (strides[4:6], strides[6:8]) if residual is not None else ((0, 0), (0, 0))
    tile = _tile(FORWARD, limits(x.device), x, weight, residual is not None, rounding)
    numbers = *x_strides, *residual_strides, *out_strides, *h_strides, num_rows, n, inner, eps, weight_offset
    constants = {**_options(residual, weight, rounding), **rows.constants(n, tile)}
    grid = ceil_div(num_rows, tile.block_m), 1, 1
    _run(grid, (x, residual, weight, out, h), numbers, constants, tile.num_warps)


def _options(residual, weight, rounding):
    return {"HAS_RESIDUAL": residual is not None, "HAS_WEIGHT": weight is not None, "ROUND_FIRST": rounding == "llama"}


def _launch_copied(x, residual, weight, out, h, eps, weight_offset, rounding):
    """The slower way of tensors that need more than two row strides: through contiguous copies."""
    contiguous = x.new_empty(x.shape)
    sums = None if residual is None else x.new_empty(x.shape)
    addend = None if residual is None else residual.contiguous()
    _launch(x.contiguous(), addend, weight, contiguous, sums, eps, weight_offset, rounding)
    out.copy_(contiguous)
    if residual is not None:
        h.copy_(sums)


def rms_norm_quantized(x, weight, eps, weight_offset, rounding, dtype):
    """Launch the kernel that ends in codes, without a residual."""
    values, scale = codes.empty_rows(x, dtype)
    _launch_quantized(x, None, weight, values, scale, None, eps, weight_offset, rounding)
    return values, scale


def add_rms_norm_quantized(x, residual, weight, eps, weight_offset, rounding, dtype):
    """Launch the kernel that ends in codes, with a residual."""
    (values, scale), h = codes.empty_rows(x, dtype), x.new_empty(x.shape)
    _launch_quantized(x, residual, weight, values, scale, h, eps, weight_offset, rounding)
    return values, scale, h


def _launch_quantized(x, residual, weight, values, scale, h, eps, weight_offset, rounding):
    if x.numel() == 0:
        scale.fill_(codes.LEAST_SCALE)
        return
    given, (num_rows, inner, strides) = rows.stridable(*(t for t in (x, residual) if t is not None))
    n = x.shape[-1]
    tile = _tile(QUANTIZED, limits(x.device), x, weight, residual is not None, rounding, values.dtype)
    stored, code, by_integers = codes.as_stored(values)
    tensors = given[0], None if residual is None else given[1], weight, stored, scale, h
    numbers = *strides[:2], *(strides[2:4] or (0, 0)), num_rows, n, inner, eps, weight_offset
    constants = {"CODE": code, "BY_INTEGERS": by_integers, **rows.constants(n, tile)}
    constants = {**_options(residual, weight, rounding), **constants}
    grid = ceil_div(num_rows, tile.block_m), 1, 1
    _run_quantized(grid, tensors, numbers, constants, tile.num_warps, maxnreg=_max_registers(n, tile))


def _max_registers(n, tile):
    """Where rows are read in blocks, all registers that 16 warps have: left to itself, ptxas spills to use fewer."""
    return None if n <= tile.block_n else 128


def rms_norm_backward(grad, x, weight, eps, weight_offset, grad_h):
    """dx in one pass over the rows, and the weight's gradient from one partial sum per program."""
    n = x.shape[-1]
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx, x.new_zeros(0) if weight is None else torch.zeros_like(weight)
    given = [rows.dense(tensor) for tensor in (grad, x, grad_h) if tensor is not None]
    given, (num_rows, inner, strides) = rows.stridable(*given)
    device_limits = limits(x.device)
    tile = _tile(BACKWARD, device_limits, x, weight, grad_h is not None)
    programs = min(ceil_div(num_rows, tile.block_m), 2 * device_limits.sm_count)
    partial = None if weight is None else x.new_empty((programs, n), dtype=torch.float32)
    _rms_norm_backward_kernel[(programs,)](
        given[0], given[1], weight, given[2] if grad_h is not None else None, dx, partial,
        *strides[:4], *(strides[4:6] if grad_h is not None else (0, 0)),
        num_rows, n, inner, eps, weight_offset,
        HAS_WEIGHT=weight is not None, HAS_GRAD_H=grad_h is not None, **rows.constants(n, tile),
        num_warps=tile.num_warps,
    )  # fmt: skip
    return dx, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


SCALARS = {"M": "i32", "N": "i32", "eps": "fp32", "weight_offset": "fp32"}


def examples(dtype, target):
    """One launch per kernel and path: short rows, a model's rows, the longest that a program holds, longer ones."""
    for n in (128, 4096, 16384, 32768):
        tile = rows.default(n)
        pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "h_ptr"), f"*{dtype}")
        names = ("x", "residual", "out", "h")
        strides = {f"stride_{name}_{part}": "i32" for name in names for part in ("outer", "inner")}
        yield KernelExample(
            _rms_norm_kernel, {**pointers, **strides, **SCALARS},
            {"inner": 1, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "ROUND_FIRST": False, **rows.constants(n, tile)},
            divisible=(*pointers, *strides, "N"), num_warps=tile.num_warps,
        )  # fmt: skip
        tile = rows.default(n, MAX_BLOCK_BACKWARD)
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "grad_h_ptr", "dx_ptr"), f"*{dtype}")
        pointers["dweight_ptr"] = "*fp32"
        strides = {f"stride_{name}_{part}": "i32" for name in ("grad", "x", "grad_h") for part in ("outer", "inner")}
        yield KernelExample(
            _rms_norm_backward_kernel, {**pointers, **strides, **SCALARS},
            {"inner": 1, "HAS_WEIGHT": True, "HAS_GRAD_H": True, **rows.constants(n, tile)},
            divisible=(*pointers, *strides, "N"), num_warps=tile.num_warps,
        )  # fmt: skip
    for n, code in ((4096, "int8"), (16384, "fp8e4nv"), (32768, "int8")):
        yield _example_quantized(dtype, n, codes.example(code, target))


def _example_quantized(dtype, n, how):
    """A launch with a residual and a weight."""
    stored, code, by_integers = how
    tile = rows.default(n)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), f"*{dtype}")
    pointers |= {"values_ptr": f"*{stored}", "scale_ptr": "*fp32", "h_ptr": f"*{dtype}"}
    strides = {f"stride_{name}_{part}": "i32" for name in ("x", "residual") for part in ("outer", "inner")}
    return KernelExample(
        _rms_norm_quantized_kernel, {**pointers, **strides, **SCALARS},
        {"inner": 1, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "ROUND_FIRST": False, "CODE": code,
         "BY_INTEGERS": by_integers, **rows.constants(n, tile)},
        divisible=(*pointers, *strides, "N"), num_warps=tile.num_warps, max_registers=_max_registers(n, tile),
    )  # fmt: skip

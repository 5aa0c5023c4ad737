"""Layer norm on the GPU: one program takes whole rows.

Rows are shifted by a float32 mean first; the mean and the variance of what remains finish both to full accuracy. A row
in one block is shifted by its own mean, a longer one by its first block's: where that block is a share p of the row,
the squares summed are at most 1/p times those of the variance (p >= 1/16 here), so little cancels.
"""

import torch
import triton
import triton.language as tl

from fusedops._core import rows
from fusedops._core.device import limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div
from fusedops._core.relaunch import Relauncher
from fusedops._core.tl import row_offsets


@triton.jit
def _load_rows(x_rows, residual_rows, offs_n, mask, HAS_RESIDUAL: tl.constexpr):
    """A block of x, or of x + residual as it rounds to their dtype, in float32."""
    x = tl.load(x_rows + offs_n, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_rows + offs_n, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _moments(shifted, squares, N, eps):
    """The mean of shifted rows and 1 / their standard deviation, from sums that are zero past the row's end."""
    mean = tl.sum(shifted, axis=1)[:, None] / N
    variance = tl.sum(squares, axis=1)[:, None] / N - mean * mean
    variance = tl.where(variance < 0.0, 0.0, variance)  # rounding; NaN stays NaN
    return mean, 1.0 / tl.sqrt_rn(variance + eps)


@triton.jit
def _scale(y, weight_ptr, bias_ptr, offs_n, N, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    return y


@triton.jit
def _layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, h_ptr,
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    stride_out_outer, stride_out_inner, stride_h_outer, stride_h_inner,
    M, N, inner, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_M rows; rows longer than BLOCK_N are read twice, the second time from cache."""
    dtype = out_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[:, None]
    x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)[:, None]
    out_rows = out_ptr + row_offsets(offs_m, inner, stride_out_outer, stride_out_inner)[:, None]
    residual_rows = x_rows
    h_rows = x_rows
    if HAS_RESIDUAL:
        residual_rows = residual_ptr + row_offsets(offs_m, inner, stride_residual_outer, stride_residual_inner)[:, None]
        h_rows = h_ptr + row_offsets(offs_m, inner, stride_h_outer, stride_h_inner)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]

    if ONE_BLOCK:
        mask = mask_m & (offs_n < N)
        x = _load_rows(x_rows, residual_rows, offs_n, mask, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(h_rows + offs_n, x.to(dtype), mask=mask)
        shifted = tl.where(mask, x - tl.sum(x, axis=1)[:, None] / N, 0.0)
        mean, rstd = _moments(shifted, shifted * shifted, N, eps)
        y = _scale((shifted - mean) * rstd, weight_ptr, bias_ptr, offs_n, N, HAS_WEIGHT, HAS_BIAS)
        tl.store(out_rows + offs_n, y.to(dtype), mask=mask)
    else:
        first = _load_rows(x_rows, residual_rows, offs_n, mask_m & (offs_n < N), HAS_RESIDUAL)
        shift = tl.sum(first, axis=1)[:, None] / BLOCK_N
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_N):
            mask = mask_m & (start + offs_n < N)
            x = _load_rows(x_rows, residual_rows, start + offs_n, mask, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(h_rows + start + offs_n, x.to(dtype), mask=mask)
            shifted = tl.where(mask, x - shift, 0.0)
            sums += shifted
            squares += shifted * shifted
        mean, rstd = _moments(sums, squares, N, eps)
        if HAS_RESIDUAL:
            tl.debug_barrier()  # h is read back below, possibly by other threads of this program
        for start in range(0, N, BLOCK_N):
            mask = mask_m & (start + offs_n < N)
            h = tl.load(h_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
            y = (h - shift - mean) * rstd
            y = _scale(y, weight_ptr, bias_ptr, start + offs_n, N, HAS_WEIGHT, HAS_BIAS)
            tl.store(out_rows + start + offs_n, y.to(dtype), mask=mask)


@triton.jit
def _layer_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, grad_h_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_grad_outer, stride_grad_inner, stride_x_outer, stride_x_inner,
    stride_grad_h_outer, stride_grad_h_inner,
    M, N, inner, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD_H: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program takes every num_programs-th tile of rows: dx, and its own rows of partial parameter gradients."""
    num_programs = tl.num_programs(0)
    first_tile = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    dtype = dx_ptr.dtype.element_ty
    if HAS_WEIGHT:
        dweight_row = dweight_ptr + first_tile * N
    if HAS_BIAS:
        dbias_row = dbias_ptr + first_tile * N
    if ONE_BLOCK:
        scale = _scale(tl.full([1, BLOCK_N], 1.0, tl.float32), weight_ptr, None, offs_n, N, HAS_WEIGHT, False)
        dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(first_tile, tl.cdiv(M, BLOCK_M), num_programs):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = (offs_m < M)[:, None]
        grad_rows = grad_ptr + row_offsets(offs_m, inner, stride_grad_outer, stride_grad_inner)[:, None]
        x_rows = x_ptr + row_offsets(offs_m, inner, stride_x_outer, stride_x_inner)[:, None]
        grad_h_rows = x_rows
        if HAS_GRAD_H:
            grad_h_rows = grad_h_ptr + row_offsets(offs_m, inner, stride_grad_h_outer, stride_grad_h_inner)[:, None]
        dx_rows = dx_ptr + (offs_m * N)[:, None]
        mask = mask_m & (offs_n < N)
        x = tl.load(x_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
        if ONE_BLOCK:
            grad = tl.load(grad_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
            shifted = tl.where(mask, x - tl.sum(x, axis=1)[:, None] / N, 0.0)
            mean, rstd = _moments(shifted, shifted * shifted, N, eps)
            # a row beyond M adds nothing to the partial sums, not even 0 / 0 where eps is 0
            xhat = (shifted - mean) * tl.where(mask_m, rstd, 0.0)
            weighted = grad * scale
            mean_grad = tl.sum(weighted, axis=1)[:, None] / N
            along = tl.sum(weighted * xhat, axis=1)[:, None] / N
            dx = rstd * (weighted - mean_grad - xhat * along)
            if HAS_GRAD_H:
                dx += tl.load(grad_h_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_rows + offs_n, dx.to(dtype), mask=mask)
            dweight += grad * xhat
            dbias += grad
        else:
            shift = tl.sum(x, axis=1)[:, None] / BLOCK_N
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            grads = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, N, BLOCK_N):
                mask = mask_m & (start + offs_n < N)
                x = tl.load(x_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                grad = tl.load(grad_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                weighted = _scale(grad, weight_ptr, None, start + offs_n, N, HAS_WEIGHT, False)
                shifted = tl.where(mask, x - shift, 0.0)
                sums += shifted
                squares += shifted * shifted
                grads += weighted
                products += weighted * shifted
            mean, rstd = _moments(sums, squares, N, eps)
            mean_grad = tl.sum(grads, axis=1)[:, None] / N
            along = rstd * (tl.sum(products, axis=1)[:, None] / N - mean * mean_grad)
            for start in range(0, N, BLOCK_N):
                mask_n = start + offs_n < N
                mask = mask_m & mask_n
                x = tl.load(x_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                grad = tl.load(grad_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                xhat = (x - shift - mean) * rstd
                weighted = _scale(grad, weight_ptr, None, start + offs_n, N, HAS_WEIGHT, False)
                dx = rstd * (weighted - mean_grad - xhat * along)
                if HAS_GRAD_H:
                    dx += tl.load(grad_h_rows + start + offs_n, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_rows + start + offs_n, dx.to(dtype), mask=mask)
                # only this program touches its rows, and BLOCK_M is 1 here: read, add, write needs no atomics
                mask_before = mask_n & (tile > first_tile)
                if HAS_WEIGHT:
                    before = tl.load(dweight_row + start + offs_n, mask=mask_before, other=0.0)
                    tl.store(dweight_row + start + offs_n, before + grad * xhat, mask=mask_n)
                if HAS_BIAS:
                    before = tl.load(dbias_row + start + offs_n, mask=mask_before, other=0.0)
                    tl.store(dbias_row + start + offs_n, before + grad, mask=mask_n)
    if ONE_BLOCK and HAS_WEIGHT:
        tl.store(dweight_row + offs_n, tl.sum(dweight, axis=0)[None, :], mask=offs_n < N)
    if ONE_BLOCK and HAS_BIAS:
        tl.store(dbias_row + offs_n, tl.sum(dbias, axis=0)[None, :], mask=offs_n < N)


# Backward keeps six float32 values an element in registers, forward two.
MAX_BLOCK_BACKWARD = rows.MAX_BLOCK // 4
_run = Relauncher(_layer_norm_kernel)


_ASKED = ("dtype", "weight", "bias", "residual")
FORWARD = rows.tunable("layer_norm", __file__, _ASKED)
BACKWARD = rows.tunable("layer_norm_backward", __file__, _ASKED, MAX_BLOCK_BACKWARD)


def config(op, device_limits, *args):
    """The configuration of one call."""
    if op == "layer_norm_backward":
        _, x, weight, bias, _, grad_h = args
        return _tile(BACKWARD, device_limits, x, weight, bias, grad_h)
    x, *residual, weight, bias, _ = args
    return _tile(FORWARD, device_limits, x, weight, bias, residual[0] if residual else None)


def _tile(tunable, device_limits, x, weight, bias, residual):
    """The tile of one kernel; of the backward one the residual is what reaches x past the norm."""
    dtypes = (None if t is None else t.dtype for t in (weight, bias))
    return tunable.choose(device_limits, (x.shape[-1],), (x.dtype, *dtypes, residual is not None))


def layer_norm(x, weight, bias, eps, out=None):
    """Launch the kernel without a residual."""
    if out is None:
        out = x.new_empty(x.shape)
    _launch(x, None, weight, bias, out, None, eps)
    return out


def add_layer_norm(x, residual, weight, bias, eps):
    """Launch the kernel with a residual."""
    out, h = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, residual, weight, bias, out, h, eps)
    return out, h


def _launch(x, residual, weight, bias, out, h, eps):
    n = x.shape[-1]
    if x.numel() == 0:
        return
    layout = rows.collapse(x, out) if residual is None else rows.collapse(x, out, residual, h)
    if layout is None:
        _launch_copied(x, residual, weight, bias, out, h, eps)
        return
    num_rows, inner, strides = layout
    x_strides, out_strides = strides[0:2], strides[2:4]
    residual_strides, h_strides = (strides[4:6], strides[6:8]) if residual is not None else ((0, 0), (0, 0))
    tile = _tile(FORWARD, limits(x.device), x, weight, bias, residual)
    numbers = *x_strides, *residual_strides, *out_strides, *h_strides, num_rows, n, inner, eps
    constants = {
        "HAS_RESIDUAL": residual is not None, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
        **rows.constants(n, tile),
    }  # fmt: skip
    grid = ceil_div(num_rows, tile.block_m), 1, 1
    _run(grid, (x, residual, weight, bias, out, h), numbers, constants, tile.num_warps)


def _launch_copied(x, residual, weight, bias, out, h, eps):
    """The slower way of tensors that need more than two row strides: through contiguous copies."""
    contiguous = x.new_empty(x.shape)
    addend = None if residual is None else residual.contiguous()
    _launch(x.contiguous(), addend, weight, bias, contiguous, h, eps)
    out.copy_(contiguous)


def layer_norm_backward(grad, x, weight, bias, eps, grad_h):
    """dx in one pass over the rows, and the parameters' gradients from one row of partial sums per program."""
    n = x.shape[-1]
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx, *(x.new_empty(0) if p is None else torch.zeros_like(p) for p in (weight, bias))
    given = [rows.dense(tensor) for tensor in (grad, x, grad_h) if tensor is not None]
    given, (num_rows, inner, strides) = rows.stridable(*given)
    device_limits = limits(x.device)
    tile = _tile(BACKWARD, device_limits, x, weight, bias, grad_h)
    programs = min(ceil_div(num_rows, tile.block_m), 2 * device_limits.sm_count)
    partials = [None if p is None else x.new_empty((programs, n), dtype=torch.float32) for p in (weight, bias)]
    _layer_norm_backward_kernel[(programs,)](
        given[0], given[1], weight, given[2] if grad_h is not None else None, dx, *partials,
        *strides[:4], *(strides[4:6] if grad_h is not None else (0, 0)),
        num_rows, n, inner, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_GRAD_H=grad_h is not None,
        ONE_BLOCK=n <= tile.block_n, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    dweight, dbias = (
        x.new_empty(0) if partial is None else partial.sum(0).to(parameter.dtype)
        for partial, parameter in zip(partials, (weight, bias))
    )
    return dx, dweight, dbias


SCALARS = {"M": "i32", "N": "i32", "eps": "fp32"}


def _strides(*names):
    return {f"stride_{name}_{part}": "i32" for name in names for part in ("outer", "inner")}


def examples(dtype, target):
    """One launch per kernel and path: short rows, a model's rows, the longest that a program holds, longer ones."""
    for n in (128, 4096, 16384, 32768):
        tile = rows.default(n)
        pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "out_ptr", "h_ptr"), f"*{dtype}")
        strides = _strides("x", "residual", "out", "h")
        yield KernelExample(
            _layer_norm_kernel, {**pointers, **strides, **SCALARS},
            {"inner": 1, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "ONE_BLOCK": n <= tile.block_n,
             "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            divisible=(*pointers, *strides, "N"), num_warps=tile.num_warps,
        )  # fmt: skip
        tile = rows.default(n, MAX_BLOCK_BACKWARD)
        pointers = dict.fromkeys(("grad_ptr", "x_ptr", "weight_ptr", "grad_h_ptr", "dx_ptr"), f"*{dtype}")
        pointers |= {"dweight_ptr": "*fp32", "dbias_ptr": "*fp32"}
        strides = _strides("grad", "x", "grad_h")
        yield KernelExample(
            _layer_norm_backward_kernel, {**pointers, **strides, **SCALARS},
            {"inner": 1, "HAS_WEIGHT": True, "HAS_BIAS": True, "HAS_GRAD_H": True, "ONE_BLOCK": n <= tile.block_n,
             "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            divisible=(*pointers, *strides, "N"), num_warps=tile.num_warps,
        )  # fmt: skip

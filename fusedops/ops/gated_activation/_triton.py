"""Gated activations on the GPU: every element is read once and written once."""

import torch
import triton
import triton.language as tl

from fusedops._core import codes, rows
from fusedops._core.device import limits
from fusedops._core.launch import KernelExample
from fusedops._core.numbers import ceil_div, power_of_2
from fusedops._core.relaunch import Relauncher
from fusedops._core.tl import activate, encoded, inverse_of, largest_bits, row_offsets, scale_of, size_bits
from fusedops._core.tuning import Tunable


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "silu":
        share = _sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    else:
        share = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share + x * (share * (1.0 - share)) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    return slope


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns and mask of this program's tile; tiles are counted along the rows first."""
    pid = tl.program_id(0).to(tl.int64)
    num_tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = pid // num_tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    return offs_m, offs_n, (offs_m < M)[:, None] & (offs_n < N)


@triton.jit
def _gated_kernel(
    gate_ptr, up_ptr, out_ptr,
    stride_gate_outer, stride_gate_inner, stride_up_outer, stride_up_inner, stride_out_outer, stride_out_inner,
    M, N, inner,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of BLOCK_M rows by BLOCK_N columns."""
    dtype = out_ptr.dtype.element_ty
    offs_m, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    gate_rows = gate_ptr + row_offsets(offs_m, inner, stride_gate_outer, stride_gate_inner)[:, None]
    up_rows = up_ptr + row_offsets(offs_m, inner, stride_up_outer, stride_up_inner)[:, None]
    out_rows = out_ptr + row_offsets(offs_m, inner, stride_out_outer, stride_out_inner)[:, None]
    gate = tl.load(gate_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
    activated = activate(gate, ACTIVATION).to(dtype).to(tl.float32)
    tl.store(out_rows + offs_n, (activated * up).to(dtype), mask=mask)


@triton.jit
def _product(gate_ptrs, up_ptrs, mask, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """A tile of the result in `dtype`, float32 again."""
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
    return (activate(gate, ACTIVATION).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)


@triton.jit
def _gated_quantized_kernel(
    gate_ptr, up_ptr, values_ptr, scale_ptr,
    stride_gate_outer, stride_gate_inner, stride_up_outer, stride_up_inner, M, N, inner,
    ACTIVATION: tl.constexpr, CODE: tl.constexpr, BY_INTEGERS: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows as codes; rows longer than BLOCK_N twice, the second time from cache."""
    dtype = gate_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_m = offs_m < M
    gate_ptrs = gate_ptr + row_offsets(offs_m, inner, stride_gate_outer, stride_gate_inner)[:, None] + offs_n
    up_ptrs = up_ptr + row_offsets(offs_m, inner, stride_up_outer, stride_up_inner)[:, None] + offs_n
    values_ptrs = values_ptr + (offs_m * N)[:, None] + offs_n
    if ONE_BLOCK:
        mask = mask_m[:, None] & (offs_n < N)
        y = _product(gate_ptrs, up_ptrs, mask, dtype, ACTIVATION)
        scale = scale_of(largest_bits(y, 1), CODE)
        tl.store(values_ptrs, encoded(y * inverse_of(scale)[:, None], CODE, -127.0, BY_INTEGERS), mask=mask)
    else:
        tops = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for start in range(0, N, BLOCK_N):
            mask = mask_m[:, None] & (start + offs_n < N)
            y = _product(gate_ptrs + start, up_ptrs + start, mask, dtype, ACTIVATION)
            tops = tl.maximum(tops, size_bits(y))
        scale = scale_of(tl.max(tops, 1), CODE)
        inverse = inverse_of(scale)[:, None]
        for start in range(0, N, BLOCK_N):
            mask = mask_m[:, None] & (start + offs_n < N)
            y = _product(gate_ptrs + start, up_ptrs + start, mask, dtype, ACTIVATION)
            tl.store(values_ptrs + start, encoded(y * inverse, CODE, -127.0, BY_INTEGERS), mask=mask)
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)


@triton.jit
def _gated_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    stride_grad_outer, stride_grad_inner, stride_gate_outer, stride_gate_inner, stride_up_outer, stride_up_inner,
    M, N, inner,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of both gradients, which are contiguous."""
    dtype = dgate_ptr.dtype.element_ty
    offs_m, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    grad_rows = grad_ptr + row_offsets(offs_m, inner, stride_grad_outer, stride_grad_inner)[:, None]
    gate_rows = gate_ptr + row_offsets(offs_m, inner, stride_gate_outer, stride_gate_inner)[:, None]
    up_rows = up_ptr + row_offsets(offs_m, inner, stride_up_outer, stride_up_inner)[:, None]
    grad = tl.load(grad_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_rows + offs_n, mask=mask, other=0.0).to(tl.float32)
    activated = activate(gate, ACTIVATION).to(dtype).to(tl.float32)
    offsets = (offs_m * N)[:, None] + offs_n
    tl.store(dgate_ptr + offsets, (grad * up * _slope(gate, ACTIVATION)).to(dtype), mask=mask)
    tl.store(dup_ptr + offsets, (grad * activated).to(dtype), mask=mask)


BLOCK = 2048  # elements of a tile: 32 bytes or more per thread and tensor in flight
NUM_WARPS = 4
_run, _run_quantized = Relauncher(_gated_kernel), Relauncher(_gated_quantized_kernel)


def _default(n):
    """Tiles of one size, as wide as the rows allow; results do not depend on it, since no element sees another."""
    block_n = min(power_of_2(n), BLOCK)
    return rows.RowConfig(BLOCK // block_n, block_n, NUM_WARPS)


def _fits(tile, n, device_limits):
    """Whether rows are cut into tiles, and a thread has registers for its values and wide accesses."""
    values = tile.block_n // (32 * tile.num_warps)
    return tile.block_m == 1 and tile.block_n <= n and rows.MIN_VALUES <= values <= rows.MAX_VALUES


def _tunable(name):
    space = {"block_n": (1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8)}
    return Tunable(
        name, default=lambda n, device_limits: _default(n), sizes=("n",), also=("dtype", "activation"), space=space,
        fits=_fits, source=__file__,
    )  # fmt: skip


FORWARD, BACKWARD = _tunable("gated_activation"), _tunable("gated_activation_backward")
QUANTIZED = rows.tunable("silu_mul_quantized", __file__, ("dtype", "codes"))


def config(op, device_limits, *args):
    """The configuration of one call."""
    if op == "silu_mul_quantized":
        return QUANTIZED.choose(device_limits, args[0].shape[-1:], (args[0].dtype, args[2]))
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    layout = _layout(*tensors)
    activation = _gelu_name(args[len(tensors)]) if op.startswith("gelu") else "silu"
    tunable = BACKWARD if op.endswith("backward") else FORWARD
    n = args[0].numel() if layout is None else layout[1]
    return tunable.choose(device_limits, (n,), (args[0].dtype, activation))


def _layout(*tensors):
    """(rows, columns, inner, strides): one long row where every tensor is contiguous, else as `rows.collapse`."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return 1, tensors[0].numel(), 1, (0, 0) * len(tensors)
    layout = rows.collapse(*tensors)
    return None if layout is None else (layout[0], tensors[0].shape[-1], *layout[1:])


def silu_mul(gate, up, out=None):
    """Launch the kernel with SiLU."""
    return _launch(gate, up, out, "silu")


def gelu_mul(gate, up, approximate, out=None):
    """Launch the kernel with either GELU."""
    return _launch(gate, up, out, _gelu_name(approximate))


def silu_mul_quantized(gate, up, dtype):
    """Launch the kernel whose programs take whole rows."""
    values, scale = codes.empty_rows(gate, dtype)
    if gate.numel() == 0:
        return values, scale.fill_(codes.LEAST_SCALE)
    (gate, up), (num_rows, inner, strides) = rows.stridable(gate, up)
    n = gate.shape[-1]
    tile = QUANTIZED.choose(limits(gate.device), (n,), (gate.dtype, dtype))
    stored, code, by_integers = codes.as_stored(values)
    constants = {"ACTIVATION": "silu", "CODE": code, "BY_INTEGERS": by_integers, **rows.constants(n, tile)}
    grid = ceil_div(num_rows, tile.block_m), 1, 1
    _run_quantized(grid, (gate, up, stored, scale), (*strides, num_rows, n, inner), constants, tile.num_warps)
    return values, scale


def silu_mul_backward(grad, gate, up):
    """Launch the backward kernel with SiLU."""
    return _launch_backward(grad, gate, up, "silu")


def gelu_mul_backward(grad, gate, up, approximate):
    """Launch the backward kernel with either GELU."""
    return _launch_backward(grad, gate, up, _gelu_name(approximate))


def _gelu_name(approximate):
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _launch(gate, up, out, activation):
    if out is None:
        out = gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return out
    layout = _layout(gate, up, out)
    if layout is None:  # more than two row strides: the slower way, through contiguous copies
        return out.copy_(_launch(gate.contiguous(), up.contiguous(), None, activation))
    num_rows, n, inner, strides = layout
    tile = FORWARD.choose(limits(gate.device), (n,), (gate.dtype, activation))
    constants = {"ACTIVATION": activation, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    grid = ceil_div(num_rows, tile.block_m) * ceil_div(n, tile.block_n), 1, 1
    _run(grid, (gate, up, out), (*strides, num_rows, n, inner), constants, tile.num_warps)
    return out


def _launch_backward(grad, gate, up, activation):
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return dgate, dup
    given = [rows.dense(tensor) for tensor in (grad, gate, up)]
    layout = _layout(*given)
    if layout is None:
        given = [tensor.contiguous() for tensor in given]
        layout = _layout(*given)
    num_rows, n, inner, strides = layout
    tile = BACKWARD.choose(limits(gate.device), (n,), (gate.dtype, activation))
    _gated_backward_kernel[(ceil_div(num_rows, tile.block_m) * ceil_div(n, tile.block_n),)](
        *given, dgate, dup, *strides, num_rows, n, inner,
        ACTIVATION=activation, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
    )  # fmt: skip
    return dgate, dup


def examples(dtype, target):
    """Each activation on one row of more than 2**31 elements, and on rows of packed halves; codes of a model's rows."""
    for n, code in ((14336, "int8"), (28672, "fp8e4nv")):
        yield _example_quantized(dtype, n, codes.example(code, target))
    forward = (_gated_kernel, ("gate", "up", "out"), ("gate", "up", "out"))
    backward = (_gated_backward_kernel, ("grad", "gate", "up", "dgate", "dup"), ("grad", "gate", "up"))
    for kernel, tensors, strided in (forward, backward):
        pointers = {f"{name}_ptr": f"*{dtype}" for name in tensors}
        strides = {f"stride_{name}_{part}": "i32" for name in strided for part in ("outer", "inner")}
        for activation in ("silu", "gelu", "gelu_tanh"):
            for n, sizes, single in ((1 << 32, {"N": "i64"}, {"M": 1}), (128, {"M": "i32", "N": "i32"}, {})):
                tile = _default(n)
                yield KernelExample(
                    kernel, {**pointers, **strides, **sizes},
                    {**single, "inner": 1, "ACTIVATION": activation, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
                    divisible=(*pointers, *strides, "N"), num_warps=tile.num_warps,
                )  # fmt: skip


def _example_quantized(dtype, n, how):
    """A launch over rows of packed halves."""
    stored, code, by_integers = how
    tile = rows.default(n)
    pointers = {"gate_ptr": f"*{dtype}", "up_ptr": f"*{dtype}", "values_ptr": f"*{stored}", "scale_ptr": "*fp32"}
    strides = {f"stride_{name}_{part}": "i32" for name in ("gate", "up") for part in ("outer", "inner")}
    return KernelExample(
        _gated_quantized_kernel, {**pointers, **strides, "M": "i32", "N": "i32"},
        {"inner": 1, "ACTIVATION": "silu", "CODE": code, "BY_INTEGERS": by_integers, "ONE_BLOCK": n <= tile.block_n,
         "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        divisible=(*pointers, *strides, "N"), num_warps=tile.num_warps,
    )  # fmt: skip

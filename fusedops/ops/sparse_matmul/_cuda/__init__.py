"""sparse_matmul on NVIDIA's sparse tensor cores: which kernel takes a call, and its launch."""

from fusedops._core import invariance
from fusedops._core.device import limits
from fusedops._core.scales import row_kind
from fusedops.ops.sparse_matmul._cuda import mma, wgmma
from fusedops.ops.sparse_matmul._cuda.epilogue import Epilogue

FEW_ROWS = 64  # up to which the weight's bytes are all that counts; the Triton kernel is made for them


def supports(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """Why no kernel takes the call, or None. Batch-invariant calls have one kernel for any number of rows."""
    if a.shape[0] <= FEW_ROWS and not invariance.enabled():
        return f"its tiles are for more than {FEW_ROWS} rows, got {a.shape[0]}"
    device_limits = limits(a.device)
    reasons = [kernel.rejection(device_limits, a, values, metadata) for kernel in (wgmma, mma)]
    return None if None in reasons else "; ".join(reasons)


def config(op, device_limits, *args):
    """The configuration of one call."""
    return _kernel(device_limits, *args)[1]


def _kernel(device_limits, a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """The kernel that takes a call, the one of Hopper where it can, and its tile.

    That one asks where a starts; a that starts elsewhere is copied for it only if there is no other kernel, or where
    a row's bits must not follow from its address.
    """
    also = a.dtype, out_dtype, row_kind(scale_a), row_kind(scale_b), bias is not None, activation
    rejected = [kernel.rejection(device_limits, a, values, metadata) for kernel in (mma, wgmma)]
    hopper = rejected[1] is None and (rejected[0] is not None or invariance.enabled() or not wgmma.misses(a))
    kernel = wgmma if hopper else mma
    return kernel, kernel.config(device_limits, a, values, also)


def sparse_matmul(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """Launch a kernel."""
    out = a.new_empty((a.shape[0], values.shape[0]), dtype=out_dtype)
    if not out.numel():
        return out
    # A call that is like an earlier one comes here without being asked about, wherever its tensors start.
    values, metadata = (x.clone() if x.data_ptr() % mma.ALIGNMENT else x for x in (values, metadata))
    device_limits = limits(a.device)
    epilogue = Epilogue.of(scale_a, scale_b, bias, out_dtype, activation)
    kernel, tile = _kernel(device_limits, a, values, metadata, scale_a, scale_b, bias, out_dtype, activation)
    if kernel is wgmma and wgmma.misses(a):
        a = a.new_empty_strided(a.shape, a.stride()).copy_(a)
    kernel.launch(tile, device_limits, a, values, metadata, epilogue, out)
    return out

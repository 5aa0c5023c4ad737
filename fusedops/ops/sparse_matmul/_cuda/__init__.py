"""sparse_matmul on NVIDIA's sparse tensor cores: which kernel takes a call, and its launch."""

from fusedops._core import invariance
from fusedops._core.device import limits
from fusedops.ops.sparse_matmul._cuda import mma
from fusedops.ops.sparse_matmul._cuda.epilogue import Epilogue

FEW_ROWS = 64  # up to which the weight's bytes are all that counts; the Triton kernel is made for them


def supports(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """Why no kernel takes the call, or None. Batch-invariant calls have one kernel for any number of rows."""
    if a.shape[0] <= FEW_ROWS and not invariance.enabled():
        return f"its tiles are for more than {FEW_ROWS} rows, got {a.shape[0]}"
    return mma.rejection(limits(a.device), a, values, metadata)


def config(op, device_limits, a, values, *rest):
    """The configuration of one call."""
    return mma.default(a.shape[0], values.shape[0], device_limits)


def sparse_matmul(a, values, metadata, scale_a, scale_b, bias, out_dtype, activation):
    """Launch a kernel."""
    rows, columns = a.shape[0], values.shape[0]
    out = a.new_empty((rows, columns), dtype=out_dtype)
    if not rows:
        return out
    # A call that is like an earlier one comes here without being asked about, wherever its tensors start.
    values, metadata = (x.clone() if x.data_ptr() % mma.ALIGNMENT else x for x in (values, metadata))
    device_limits = limits(a.device)
    epilogue = Epilogue.of(scale_a, scale_b, bias, out_dtype, activation)
    tile = mma.default(rows, columns, device_limits)
    mma.launch(tile, device_limits, a, values, metadata, epilogue, out)
    return out

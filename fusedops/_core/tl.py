"""Helpers that Triton kernels of several operators share."""

import triton
import triton.language as tl


@triton.jit
def row_offsets(rows, inner, stride_outer, stride_inner):
    """Element offsets of rows laid out as by `rows.collapse`, in int64 before any multiplication."""
    rows = rows.to(tl.int64)
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner

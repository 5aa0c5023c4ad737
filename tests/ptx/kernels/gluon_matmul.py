"""A Gluon matrix product for Hopper: one warp loads tiles with TMA, a warpgroup multiplies them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load(a_desc, b_desc, a_smem, b_smem, full, empty, K, STAGES: gl.constexpr):
    BLOCK_K: gl.constexpr = a_desc.block_shape[1]
    for i in range(gl.cdiv(K, BLOCK_K)):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES + 1) % 2)
        mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            a_desc, [gl.program_id(0) * a_desc.block_shape[0], i * BLOCK_K], full.index(stage), a_smem.index(stage)
        )
        tma.async_copy_global_to_shared(
            b_desc, [gl.program_id(1) * b_desc.block_shape[0], i * BLOCK_K], full.index(stage), b_smem.index(stage)
        )


@gluon.jit
def _multiply(out_desc, a_smem, b_smem, full, empty, K, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    BLOCK_M: gl.constexpr = out_desc.block_shape[0]
    BLOCK_N: gl.constexpr = out_desc.block_shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
    for i in range(gl.cdiv(K, BLOCK_K)):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES % 2)
        acc = warpgroup_mma(a_smem.index(stage), b_smem.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [BLOCK_M, BLOCK_N], out_desc.layout)
    out_smem.store(acc.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [gl.program_id(0) * BLOCK_M, gl.program_id(1) * BLOCK_N], out_smem)
    tma.store_wait(0)


@gluon.jit
def gluon_matmul_kernel(a_desc, b_desc, out_desc, K, STAGES: gl.constexpr):
    """One tile of ``a @ b.T``."""
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_shape, a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_shape, b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out_desc, a_smem, b_smem, full, empty, K, a_desc.block_shape[1], STAGES)),
            (_load, (a_desc, b_desc, a_smem, b_smem, full, empty, K, STAGES)),
        ],
        [1],
        [24],
    )


@gluon.jit
def gluon_copy_kernel(x_ptr, out_ptr, n, BLOCK: gl.constexpr):
    """A copy with a layout of its own."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    offs = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout)
    gl.store(out_ptr + offs, gl.load(x_ptr + offs, offs < n), offs < n)

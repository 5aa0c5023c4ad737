"""The kernel on Hopper's asynchronous units: TMA loads, WGMMA products, one warp that loads and two warpgroups.

Tiles of a and b pass through a ring in shared memory. Each warpgroup multiplies 64 rows of the tile and finishes them,
while the loading warp is ahead with the next tile's depth blocks. Of float8 a depth block's products are a sum of their
own, which float32 takes over: while one warpgroup adds, the other's products stand in the tensor cores.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate

from fusedops._core.gl import barriers
from fusedops._core.tl import activate, split_columns, times
from fusedops._core.tl_epilogue import to_float

GROUP_ROWS = gl.constexpr(64)  # rows of one warpgroup: the M of a WGMMA instruction
NUM_GROUPS = gl.constexpr(2)
SCALE_BLOCK = gl.constexpr(128)
FIRST, SECOND = gl.constexpr(0), gl.constexpr(1)


@aggregate
class Work:
    """Sizes, and how the tiles of the result are handed out."""

    M: gl.tensor
    N: gl.tensor
    K: gl.tensor
    BLOCK_N: gl.constexpr
    BLOCK_K: gl.constexpr
    GROUP_M: gl.constexpr
    NUM_STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, M, N, K, BLOCK_N, BLOCK_K, GROUP_M, NUM_STAGES):
        self.M = M
        self.N = N
        self.K = K
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.BLOCK_K = gl.constexpr(BLOCK_K)
        self.GROUP_M = gl.constexpr(GROUP_M)
        self.NUM_STAGES = gl.constexpr(NUM_STAGES)

    @gluon.jit
    def num_tiles(self):
        """Tiles of the result."""
        return gl.cdiv(self.M, NUM_GROUPS * GROUP_ROWS) * gl.cdiv(self.N, self.BLOCK_N)

    @gluon.jit
    def tile(self, index):
        """First row and column of a tile: GROUP_M rows of tiles are walked through column by column."""
        in_group = self.GROUP_M * gl.cdiv(self.N, self.BLOCK_N)
        first_m = index // in_group * self.GROUP_M
        rows = gl.minimum(gl.cdiv(self.M, NUM_GROUPS * GROUP_ROWS) - first_m, self.GROUP_M)
        pid_m = first_m + index % in_group % rows
        return pid_m * (NUM_GROUPS * GROUP_ROWS), index % in_group // rows * self.BLOCK_N


@aggregate
class Ring:
    """Tiles of a and b in shared memory with the barriers that say when they are full, and when they are free."""

    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, a, b, full, empty):
        self.a = a
        self.b = b
        self.full = full
        self.empty = empty


@aggregate
class Epilogue:
    """What follows the product; pointers that are not used are scale_a's."""

    scale_a_ptr: gl.tensor
    scale_b_ptr: gl.tensor
    bias_ptr: gl.tensor
    residual_ptr: gl.tensor
    out_ptr: gl.tensor
    stride_scale_a_m: gl.tensor
    stride_scale_a_k: gl.tensor
    stride_scale_b_n: gl.tensor
    stride_scale_b_k: gl.tensor
    stride_residual_m: gl.tensor
    ACTIVATION: gl.constexpr
    GATED: gl.constexpr
    SCALE_A: gl.constexpr
    SCALE_B: gl.constexpr
    HAS_BIAS: gl.constexpr
    HAS_RESIDUAL: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr, stride_scale_a_m, stride_scale_a_k,
        stride_scale_b_n, stride_scale_b_k, stride_residual_m, ACTIVATION, GATED, SCALE_A, SCALE_B, HAS_BIAS,
        HAS_RESIDUAL,
    ):  # fmt: skip
        self.scale_a_ptr = scale_a_ptr
        self.scale_b_ptr = scale_b_ptr
        self.bias_ptr = bias_ptr
        self.residual_ptr = residual_ptr
        self.out_ptr = out_ptr
        self.stride_scale_a_m = stride_scale_a_m
        self.stride_scale_a_k = stride_scale_a_k
        self.stride_scale_b_n = stride_scale_b_n
        self.stride_scale_b_k = stride_scale_b_k
        self.stride_residual_m = stride_residual_m
        self.ACTIVATION = gl.constexpr(ACTIVATION)
        self.GATED = gl.constexpr(GATED)
        self.SCALE_A = gl.constexpr(SCALE_A)
        self.SCALE_B = gl.constexpr(SCALE_B)
        self.HAS_BIAS = gl.constexpr(HAS_BIAS)
        self.HAS_RESIDUAL = gl.constexpr(HAS_RESIDUAL)

    @gluon.jit
    def block_unit(self, rows, first_n, block, M):
        """What multiplies the sums of a depth block: the scales of blocks, as far as there are any."""
        unit = gl.full(rows.shape, 1.0, gl.float32, rows.type.layout)
        if self.SCALE_A == "block":
            place = rows.to(gl.int64) * self.stride_scale_a_m + block * self.stride_scale_a_k
            unit = gl.load(self.scale_a_ptr + place, mask=rows < M, other=0.0)
        if self.SCALE_B == "block":
            unit *= gl.load(
                self.scale_b_ptr + first_n // SCALE_BLOCK * self.stride_scale_b_n + block * self.stride_scale_b_k
            )
        return unit

    @gluon.jit
    def store(self, acc, first_m, first_n, work):
        """Finish 64 columns at a time, so that what stands between takes few registers: 128 sums of 16-bit pairs."""
        IS_NARROW: gl.constexpr = self.out_ptr.dtype.element_ty.primitive_bitwidth == 16
        if acc.shape[1] > (128 if self.GATED and IS_NARROW else 64):
            HALF: gl.constexpr = acc.shape[1] // 2
            LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
            left, right = gl.split(acc.reshape([GROUP_ROWS, 2, HALF]).permute((0, 2, 1)))
            self.store_part(gl.convert_layout(left, LAYOUT, assert_trivial=True), first_m, first_n, work)
            self.store_part(gl.convert_layout(right, LAYOUT, assert_trivial=True), first_m, first_n + HALF, work)
        else:
            self.store_part(acc, first_m, first_n, work)

    @gluon.jit
    def store_part(self, acc, first_m, first_n, work):
        """What the sums become, and 16 bytes for each thread to the result."""
        if self.GATED:
            gate, up = split_columns(acc)
            rows = first_m + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, gate.type.layout))
            columns = first_n + 2 * gl.arange(0, gate.shape[1], gl.SliceLayout(0, gate.type.layout))
            x = activate(self.real(gate, rows, columns, work), self.ACTIVATION)
            x = times(x, self.real(up, rows, columns + 1, work))
            self.store_result(x, first_m, first_n // 2, work.N // 2, work)
        else:
            rows = first_m + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, acc.type.layout))
            columns = first_n + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
            x = activate(self.real(acc, rows, columns, work), self.ACTIVATION)
            self.store_result(x, first_m, first_n, work.N, work)

    @gluon.jit
    def real(self, acc, rows, columns, work):
        """Sums with scales and bias, in float32. Scales of blocks are in the sums."""
        BLOCK_N: gl.constexpr = acc.shape[1]
        x = to_float(acc)
        if self.SCALE_A == "one":
            x *= gl.load(self.scale_a_ptr)
        elif self.SCALE_A == "row":
            x *= gl.load(self.scale_a_ptr + rows, mask=rows < work.M, other=0.0)[:, None]
        bias = gl.zeros([BLOCK_N], gl.float32, columns.type.layout)
        if self.HAS_BIAS:
            bias = gl.load(self.bias_ptr + columns, mask=columns < work.N, other=0.0).to(gl.float32)
        scale = gl.full([BLOCK_N], 1.0, gl.float32, columns.type.layout)
        if self.SCALE_B == "one":
            scale *= gl.load(self.scale_b_ptr)
        elif self.SCALE_B == "row":
            scale = gl.load(self.scale_b_ptr + columns, mask=columns < work.N, other=0.0)
        if self.SCALE_B == "block":
            x += bias[None, :]
        elif self.HAS_BIAS:
            x = gl.fma(x, gl.expand_dims(scale, 0).broadcast_to(x.shape), bias[None, :].broadcast_to(x.shape))
        else:
            x *= scale[None, :]
        return x

    @gluon.jit
    def store_result(self, x, first_m, first_n, N, work):
        """Add the residual and store. Of float32, four threads have 32 bytes in a row as they are, but for pairs."""
        dtype: gl.constexpr = self.out_ptr.dtype.element_ty
        LAYOUT: gl.constexpr = x.type.layout
        BLOCK_N: gl.constexpr = x.shape[1]
        VECTOR: gl.constexpr = 128 // dtype.primitive_bitwidth
        LANES: gl.constexpr = min(32, BLOCK_N // VECTOR)
        VECTORS: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // LANES, LANES], [4, 1], [1, 0])
        OUT: gl.constexpr = LAYOUT if VECTOR == 4 and not self.GATED else VECTORS
        rows = (first_m + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, OUT)))[:, None]
        columns = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, OUT)))[None, :]
        mask = (rows < work.M) & (columns < N)
        rows = rows.to(gl.int64)
        if self.HAS_RESIDUAL:
            residual = gl.load(self.residual_ptr + rows * self.stride_residual_m + columns, mask=mask, other=0.0)
            x += gl.convert_layout(residual, LAYOUT).to(gl.float32)
        gl.store(self.out_ptr + rows * N + columns, gl.convert_layout(x.to(dtype), OUT), mask=mask)


@gluon.jit
def _produce(a_desc, b_desc, ring, work):
    """The loading warp: the depth blocks of this program's tiles, as places in the ring become free."""
    step = 0
    for index in range(gl.program_id(0), work.num_tiles(), gl.num_programs(0)):
        first_m, first_n = work.tile(index)
        for first_k in range(0, work.K, work.BLOCK_K):
            place = step % work.NUM_STAGES
            mbarrier.wait(ring.empty.index(place), (step // work.NUM_STAGES & 1) ^ 1)
            full = ring.full.index(place)
            mbarrier.expect(full, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [first_m, first_k], full, ring.a.index(place))
            tma.async_copy_global_to_shared(b_desc, [first_n, first_k], full, ring.b.index(place))
            step += 1


@gluon.jit
def _wait_full(ring, step, work):
    """Stand until the depth block of this step has arrived."""
    mbarrier.wait(ring.full.index(step % work.NUM_STAGES), step // work.NUM_STAGES & 1)


@gluon.jit
def _start(acc, ring, step, work, GROUP: gl.constexpr, FIRST_N: gl.constexpr, USE_ACC: gl.constexpr):
    """Start acc + a @ b.T for this warpgroup's rows and some of the columns of the depth block of this step."""
    place = step % work.NUM_STAGES
    a = ring.a.index(place).slice(GROUP * GROUP_ROWS, GROUP_ROWS)
    b = ring.b.index(place).slice(FIRST_N, acc.shape[1]).permute((1, 0))
    return warpgroup_mma(a, b, acc, use_acc=USE_ACC, is_async=True)


@gluon.jit
def _leave(ring, step, work, pred):
    """This warpgroup has read the depth block of this step."""
    mbarrier.arrive(ring.empty.index(step % work.NUM_STAGES), pred=pred)


@gluon.jit
def _consume_int(ring, epilogue, work, GROUP: gl.constexpr):
    """One warpgroup's rows of every tile, of integers: a depth block's products start while the last ones' run."""
    WIDTH: gl.constexpr = min(work.BLOCK_N, 128)
    IS_WIDE: gl.constexpr = work.BLOCK_N > WIDTH  # two halves, one after the other in what follows the product
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    step = 0
    for index in range(gl.program_id(0), work.num_tiles(), gl.num_programs(0)):
        first_m, first_n = work.tile(index)
        first_m += GROUP * GROUP_ROWS
        left = gl.zeros([GROUP_ROWS, WIDTH], gl.int32, LAYOUT)
        right = gl.zeros([GROUP_ROWS, WIDTH], gl.int32, LAYOUT)
        for first_k in range(0, work.K, work.BLOCK_K):
            _wait_full(ring, step, work)
            left_products = _start(left, ring, step, work, GROUP, 0, True)
            if IS_WIDE:
                right_products = _start(right, ring, step, work, GROUP, WIDTH, True)
                left, right = warpgroup_mma_wait(2, deps=[left_products, right_products])
            else:
                left = warpgroup_mma_wait(1, deps=[left_products])
            _leave(ring, step + work.NUM_STAGES - 1, work, first_k > 0)
            step += 1
        if IS_WIDE:
            left, right = warpgroup_mma_wait(0, deps=[left, right])
        else:
            left = warpgroup_mma_wait(0, deps=[left])
        _leave(ring, step + work.NUM_STAGES - 1, work, True)
        epilogue.store(left, first_m, first_n, work)
        if IS_WIDE:
            epilogue.store(right, first_m, first_n + WIDTH, work)


@gluon.jit
def _consume_float(ring, epilogue, work, GROUP: gl.constexpr):
    """One warpgroup's rows of every tile, of float8: a depth block's sum is made alone, then scaled and added."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_N, 32])
    BLOCKED: gl.constexpr = epilogue.SCALE_A == "block" or epilogue.SCALE_B == "block"
    last = gl.cdiv(work.K, work.BLOCK_K) - 1
    step = 0
    for index in range(gl.program_id(0), work.num_tiles(), gl.num_programs(0)):
        first_m, first_n = work.tile(index)
        first_m += GROUP * GROUP_ROWS
        rows = first_m + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, LAYOUT))
        acc = gl.zeros([GROUP_ROWS, work.BLOCK_N], gl.float32, LAYOUT)
        empty = gl.zeros([GROUP_ROWS, work.BLOCK_N], gl.float32, LAYOUT)
        unit = epilogue.block_unit(rows, first_n, 0, work.M)
        for block in range(last + 1):
            _wait_full(ring, step, work)
            products = _start(empty, ring, step, work, GROUP, 0, False)
            following = unit
            if BLOCKED:  # asked for while the products are made
                following = epilogue.block_unit(rows, first_n, gl.minimum(block + 1, last), work.M)
            part = warpgroup_mma_wait(0, deps=[products])
            _leave(ring, step, work, True)
            if BLOCKED:
                part *= unit[:, None]
                unit = following
            acc += part
            step += 1
        epilogue.store(acc, first_m, first_n, work)


@gluon.jit
def _consume(ring, epilogue, work, GROUP: gl.constexpr):
    """One warpgroup: 64 rows of every tile of this program."""
    if ring.a.dtype == gl.int8:
        _consume_int(ring, epilogue, work, GROUP)
    else:
        _consume_float(ring, epilogue, work, GROUP)


@gluon.jit(do_not_specialize=["M"])
def _scaled_matmul_hopper_kernel(
    a_desc, b_desc, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr,
    stride_scale_a_m, stride_scale_a_k, stride_scale_b_n, stride_scale_b_k, stride_residual_m, M, N, K,
    ACTIVATION: gl.constexpr, GATED: gl.constexpr, SCALE_A: gl.constexpr, SCALE_B: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, NUM_STAGES: gl.constexpr,
):  # fmt: skip
    """One persistent program computes a tile of 128 rows and BLOCK_N columns after the other."""
    ring = Ring(
        gl.allocate_shared_memory(a_desc.dtype, [NUM_STAGES] + a_desc.block_type.shape, a_desc.layout),
        gl.allocate_shared_memory(b_desc.dtype, [NUM_STAGES] + b_desc.block_type.shape, b_desc.layout),
        barriers(NUM_STAGES, 1),
        barriers(NUM_STAGES, NUM_GROUPS),
    )
    # A size or stride of 1 comes as a compile-time value.
    work = Work(M, gl.to_tensor(N), gl.to_tensor(K), BLOCK_N, BLOCK_K, GROUP_M, NUM_STAGES)
    epilogue = Epilogue(
        scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, out_ptr,
        gl.to_tensor(stride_scale_a_m), gl.to_tensor(stride_scale_a_k), gl.to_tensor(stride_scale_b_n),
        gl.to_tensor(stride_scale_b_k), gl.to_tensor(stride_residual_m),
        ACTIVATION, GATED, SCALE_A, SCALE_B, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (ring, epilogue, work, FIRST)),
            (_consume, (ring, epilogue, work, SECOND)),
            (_produce, (a_desc, b_desc, ring, work)),
        ],
        [4, 1],
        [240, 24],
    )

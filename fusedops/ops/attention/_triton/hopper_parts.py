"""What the warps of the Hopper kernel share: sizes and the order of work, scores, results, and tiles with barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

GROUP_M = gl.constexpr(64)  # rows of one warpgroup: the M of a WGMMA instruction


@aggregate
class Work:
    """What every warp of a block knows: sizes, the window (to the right always bounded), how tiles are handed out."""

    cu_q_ptr: gl.tensor
    cu_k_ptr: gl.tensor
    Sq: gl.tensor
    Sk: gl.tensor
    H: gl.tensor
    num_m: gl.tensor
    num_tiles: gl.tensor
    section: gl.tensor
    window_left: gl.tensor
    window_right: gl.tensor
    BLOCK_N: gl.constexpr
    IS_VARLEN: gl.constexpr
    HAS_LEFT: gl.constexpr
    NUM_GROUPS: gl.constexpr
    NUM_STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, cu_q_ptr, cu_k_ptr, Sq, Sk, H, num_m, num_tiles, section, window_left, window_right,
        BLOCK_N, IS_VARLEN, HAS_LEFT, NUM_GROUPS, NUM_STAGES,
    ):  # fmt: skip
        self.cu_q_ptr = cu_q_ptr
        self.cu_k_ptr = cu_k_ptr
        self.Sq = Sq
        self.Sk = Sk
        self.H = H
        self.num_m = num_m
        self.num_tiles = num_tiles
        self.section = section
        self.window_left = window_left
        self.window_right = window_right
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.IS_VARLEN = gl.constexpr(IS_VARLEN)
        self.HAS_LEFT = gl.constexpr(HAS_LEFT)
        self.NUM_GROUPS = gl.constexpr(NUM_GROUPS)
        self.NUM_STAGES = gl.constexpr(NUM_STAGES)

    @gluon.jit
    def num_rounds(self):
        """How many query tiles this block is handed."""
        whole = self.num_tiles // gl.num_programs(0)
        return whole + (self.place(whole) < self.num_tiles % gl.num_programs(0)).to(gl.int32)

    @gluon.jit
    def place(self, round_):
        """Place of this block in a round. Every other round runs backwards, so that no block is always served first."""
        return gl.where(round_ % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))

    @gluon.jit
    def tile(self, round_):
        """First query of this block's tile in a round, batch and head: all heads of a section, longest rows first."""
        index = round_ * gl.num_programs(0) + self.place(round_)
        in_section = self.section * self.num_m
        rest = index % in_section
        pid_m = self.num_m - 1 - rest // self.section
        bh = index // in_section * self.section + rest % self.section
        return pid_m * (self.NUM_GROUPS * GROUP_M), bh // self.H, bh % self.H

    @gluon.jit
    def sequence(self, b):
        """First rows of a sequence among queries and keys, and its lengths."""
        start_q = 0
        start_k = 0
        Sq = self.Sq
        Sk = self.Sk
        if self.IS_VARLEN:
            start_q = gl.load(self.cu_q_ptr + b)
            start_k = gl.load(self.cu_k_ptr + b)
            Sq = gl.load(self.cu_q_ptr + b + 1) - start_q
            Sk = gl.load(self.cu_k_ptr + b + 1) - start_k
        return start_q, start_k, Sq, Sk

    @gluon.jit
    def reach(self, first, last, Sk):
        """Keys [low, high) that a query at the positions first..last among the keys sees."""
        low = 0
        if self.HAS_LEFT:
            low = gl.maximum(first - self.window_left, 0)
        return low, gl.maximum(gl.minimum(last + self.window_right + 1, Sk), 0)

    @gluon.jit
    def key_tiles(self, first_query, Sq, Sk):
        """Key tiles [low, high) of which a query tile sees any key, and [low_full, high_full) of which it sees all."""
        first = first_query + Sk - Sq
        last = first + self.NUM_GROUPS * GROUP_M - 1
        low_key, high_key = self.reach(first, last, Sk)
        low_full_key, high_full_key = self.reach(last, first, Sk)
        low = low_key // self.BLOCK_N
        high = gl.maximum(low, gl.cdiv(high_key, self.BLOCK_N))
        low_full = gl.minimum(gl.cdiv(low_full_key, self.BLOCK_N), high)
        return low, low_full, gl.maximum(low_full, high_full_key // self.BLOCK_N), high

    @gluon.jit
    def visible(self, s, first_position, first_key, Sk, LAYOUT: gl.constexpr):
        """The scores, with -inf where the query at a position does not see the key."""
        position = (first_position + gl.arange(0, GROUP_M, gl.SliceLayout(1, LAYOUT)))[:, None]
        key = (first_key + gl.arange(0, self.BLOCK_N, gl.SliceLayout(0, LAYOUT)))[None, :]
        seen = (key < Sk) & (key <= position + self.window_right)
        if self.HAS_LEFT:
            seen = seen & (key >= position - self.window_left)
        return gl.where(seen, s, float("-inf"))


@aggregate
class Scores:
    """How products become scores in units of log 2, and the scales [1 or B, heads] of 8-bit operands."""

    scale_log2: gl.tensor
    softcap_scale: gl.tensor
    softcap_log2: gl.tensor
    q_scale_ptr: gl.tensor
    k_scale_ptr: gl.tensor
    v_scale_ptr: gl.tensor
    scale_rows: gl.tensor
    queries_per_kv: gl.tensor
    HAS_SOFTCAP: gl.constexpr
    HAS_SCALES: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, scale_log2, softcap_scale, softcap_log2, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale_rows,
        queries_per_kv, HAS_SOFTCAP, HAS_SCALES,
    ):  # fmt: skip
        self.scale_log2 = scale_log2
        self.softcap_scale = softcap_scale
        self.softcap_log2 = softcap_log2
        self.q_scale_ptr = q_scale_ptr
        self.k_scale_ptr = k_scale_ptr
        self.v_scale_ptr = v_scale_ptr
        self.scale_rows = scale_rows
        self.queries_per_kv = queries_per_kv
        self.HAS_SOFTCAP = gl.constexpr(HAS_SOFTCAP)
        self.HAS_SCALES = gl.constexpr(HAS_SCALES)

    @gluon.jit
    def unit(self, b, h, H):
        """What multiplies the products of a head."""
        unit = self.scale_log2
        if self.HAS_SCALES:
            b = b * self.scale_rows
            unit *= gl.load(self.q_scale_ptr + b * H + h)
            unit *= gl.load(self.k_scale_ptr + (b * H + h) // self.queries_per_kv)
        return unit

    @gluon.jit
    def value_unit(self, b, h, H):
        """What multiplies the result of a head."""
        unit = 1.0
        if self.HAS_SCALES:
            unit = gl.load(self.v_scale_ptr + (b * self.scale_rows * H + h) // self.queries_per_kv)
        return unit

    @gluon.jit
    def capped(self, s):
        """softcap * tanh(s * softmax_scale / softcap), from the accurate exponential; scale_log2 is 1 then."""
        if self.HAS_SOFTCAP:
            s = self.softcap_log2 - 2 * self.softcap_log2 / (gl.exp2(s * self.softcap_scale) + 1)
        return s


@aggregate
class Result:
    """Where results go: out [B, S, H, DV] by its tensor map, by its address where a tile ends in another sequence."""

    out_desc: tma.tensor_descriptor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    lse_length: gl.tensor
    sinks_ptr: gl.tensor
    DV: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, out_desc, out_ptr, lse_ptr, lse_length, sinks_ptr, DV):
        self.out_desc = out_desc
        self.out_ptr = out_ptr
        self.lse_ptr = lse_ptr
        self.lse_length = lse_length
        self.sinks_ptr = sinks_ptr
        self.DV = gl.constexpr(DV)


@aggregate
class Tiles:
    """Shared memory with the barriers that say when a place is full, and when it may be written again."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, out, q_full, q_empty, k_full, k_empty, v_full, v_empty):
        self.q = q
        self.k = k
        self.v = v
        self.out = out
        self.q_full = q_full
        self.q_empty = q_empty
        self.k_full = k_full
        self.k_empty = k_empty
        self.v_full = v_full
        self.v_empty = v_empty

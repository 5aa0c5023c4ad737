"""Attention on Hopper's asynchronous units: TMA loads, WGMMA products, one warp that loads and warpgroups that compute.

A block runs one producer warp and NUM_GROUPS consumer warpgroups of 64 query rows each. Keys and values pass through
rings of NUM_STAGES tiles in shared memory. While a warpgroup turns scores into probabilities, its value product of the
tile before and the products of the other warpgroups stand in the tensor cores; warpgroups take turns in starting
products, so that one computes while another exponentiates. Blocks are persistent and walk through the query tiles
longest first, so that a causal triangle is shared out evenly.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedops._core.gl import barriers
from fusedops._core.tl import LOG2E
from fusedops.ops.attention._triton.hopper_parts import GROUP_M, Result, Scores, Tiles, Work

FIRST, SECOND, THIRD = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # warpgroups


@gluon.jit
def _matrix(tile):
    """A tile [1, 1, rows, columns] of a tensor map as a matrix."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def _load(desc, b, h, row, tiles, full, empty, step, NUM_STAGES: gl.constexpr):
    """Load rows of a head into the place of a ring that comes at this step, once its readers have left it."""
    place = step % NUM_STAGES
    mbarrier.wait(empty.index(place), (step // NUM_STAGES & 1) ^ 1)
    mbarrier.expect(full.index(place), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, h, row, 0], full.index(place), tiles.index(place))


@gluon.jit
def _produce(q_desc, k_desc, v_desc, queries_per_kv, tiles, work):
    """The loading warp: Q of every query tile, then the key tiles from the last to the first, V one behind K."""
    step = 0
    turn = 0
    for round_ in range(work.num_rounds()):
        first_query, b, h = work.tile(round_)
        start_q, start_k, Sq, Sk = work.sequence(b)
        if first_query < Sq:
            low, _, _, high = work.key_tiles(first_query, Sq, Sk)
            place_b = b
            if work.IS_VARLEN:
                place_b = 0
            hk = h // queries_per_kv
            for group in gl.static_range(work.NUM_GROUPS):
                row = start_q + first_query + group * GROUP_M
                mbarrier.wait(tiles.q_empty.index(group), (turn & 1) ^ 1)
                mbarrier.expect(tiles.q_full.index(group), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_desc, [place_b, h, row, 0], tiles.q_full.index(group), tiles.q.index(group)
                )
            turn += 1
            for n in range(high - 1, low - 1, -1):
                row = start_k + n * work.BLOCK_N
                _load(k_desc, place_b, hk, row, tiles.k, tiles.k_full, tiles.k_empty, step, work.NUM_STAGES)
                if n < high - 1:
                    _load(v_desc, place_b, hk, row + work.BLOCK_N, tiles.v, tiles.v_full, tiles.v_empty, step - 1,
                          work.NUM_STAGES)  # fmt: skip
                step += 1
            if high > low:
                _load(v_desc, place_b, hk, start_k + low * work.BLOCK_N, tiles.v, tiles.v_full, tiles.v_empty, step - 1,
                      work.NUM_STAGES)  # fmt: skip


@gluon.jit
def _wait_turn(GROUP: gl.constexpr):
    """Stand until the warpgroup before has started its products. Triton does not use hardware barriers 8 to 11."""
    if GROUP == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, 0;", "=r,r", [GROUP], gl.int32, False, 1)
    elif GROUP == 1:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, 0;", "=r,r", [GROUP], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 10, 256; mov.b32 $0, 0;", "=r,r", [GROUP], gl.int32, False, 1)


@gluon.jit
def _pass_turn(GROUP: gl.constexpr, NUM_GROUPS: gl.constexpr):
    """Let the next warpgroup start its products."""
    if GROUP == NUM_GROUPS - 1:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, 0;", "=r,r", [GROUP], gl.int32, False, 1)
    elif GROUP == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, 0;", "=r,r", [GROUP], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 10, 256; mov.b32 $0, 0;", "=r,r", [GROUP], gl.int32, False, 1)


@gluon.jit
def _row_max(s, LAYOUT: gl.constexpr):
    """Largest score of each row: short chains of registers first, then across the four threads of a row."""
    s = s.reshape([s.shape[0], 2, s.shape[1] // 16, 8])
    return gl.convert_layout(gl.max(gl.max(gl.max(s, 2), 1), 1), LAYOUT)


@gluon.jit
def _partial_sum(p):
    """Sums [rows, 8] of every eighth probability: each thread adds what it holds."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], 2, p.shape[1] // 16, 8]), 2), 1)


@gluon.jit
def _start_scores(q, tiles, step, work, LAYOUT: gl.constexpr):
    """Start q @ k.T with the key tile of this step, which has arrived."""
    keys = _matrix(tiles.k.index(step % work.NUM_STAGES)).permute((1, 0))
    return warpgroup_mma(q, keys, gl.zeros([GROUP_M, work.BLOCK_N], gl.float32, LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def _start_values(p, acc, tiles, step, work):
    """Start acc + p @ v with the value tile of this step, once it has arrived."""
    _wait_full(tiles.v_full, step, work, True)
    values = _matrix(tiles.v.index(step % work.NUM_STAGES))
    return warpgroup_mma(p, values, acc, is_async=True)


@gluon.jit
def _clear_unseen(tiles, step, first_key, low_seen, high_seen, work, GROUP: gl.constexpr):
    """Zero the values of keys that no query of the sequence sees: their weight is 0, but 0 times NaN is NaN.

    Each warpgroup clears its share of the tile, then all meet: none may multiply before all have written. They meet
    outside of their turns, as one that holds its turn would wait for others that wait for theirs.
    """
    if work.IS_VARLEN or work.HAS_LEFT:
        if first_key < low_seen or first_key + work.BLOCK_N > high_seen:
            _wait_full(tiles.v_full, step, work, True)
            values = _matrix(tiles.v.index(step % work.NUM_STAGES))
            ROWS: gl.constexpr = 32  # few registers at a time
            LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            for part in gl.static_range(GROUP, work.BLOCK_N // ROWS, work.NUM_GROUPS):
                rows = values.slice(part * ROWS, ROWS)
                key = first_key + part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
                seen = (key >= low_seen) & (key < high_seen)
                rows.store(gl.where(seen[:, None], rows.load(LAYOUT), 0.0))
            fence_async_shared()
            gl.static_assert(work.NUM_GROUPS == 2)  # how many threads meet
            gl.inline_asm_elementwise("bar.sync 11, 256; mov.b32 $0, 0;", "=r,r", [GROUP], gl.int32, False, 1)


@gluon.jit
def _wait_full(full, step, work, pred):
    """Stand until the tile of this step has arrived."""
    mbarrier.wait(full.index(step % work.NUM_STAGES), step // work.NUM_STAGES & 1, pred=pred)


@gluon.jit
def _leave(empty, step, work):
    """This warpgroup has read the tile of this step."""
    mbarrier.arrive(empty.index(step % work.NUM_STAGES))


@gluon.jit
def _consume(result, scores, tiles, work, GROUP: gl.constexpr, HAS_SINKS: gl.constexpr, OUT_IN_Q: gl.constexpr):
    """One warpgroup: 64 rows of every query tile of this block."""
    dtype: gl.constexpr = result.out_desc.dtype
    BLOCK_DV: gl.constexpr = result.out_desc.block_type.shape[3]
    INSTRUCTION_K: gl.constexpr = 256 // tiles.q.dtype.primitive_bitwidth
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_N, INSTRUCTION_K])
    OUT_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, OUT_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT_LAYOUT)
    q = _matrix(tiles.q.index(GROUP))
    if GROUP == work.NUM_GROUPS - 1:
        _pass_turn(GROUP, work.NUM_GROUPS)
    step = 0
    turn = 0
    for round_ in range(work.num_rounds()):
        first_query, b, h = work.tile(round_)
        start_q, _, Sq, Sk = work.sequence(b)
        if first_query < Sq:
            low, low_full, high_full, high = work.key_tiles(first_query, Sq, Sk)
            low_seen, high_seen = work.reach(Sk - Sq, Sk - 1, Sk)
            first_query += GROUP * GROUP_M
            position = first_query + Sk - Sq
            unit = scores.unit(b, h, work.H)
            m_i = gl.full([GROUP_M], float("-inf"), gl.float32, ROWS)
            l_i = _partial_sum(gl.zeros([GROUP_M, work.BLOCK_N], gl.float32, S_LAYOUT))
            acc = gl.zeros([GROUP_M, BLOCK_DV], gl.float32, OUT_LAYOUT)
            mbarrier.wait(tiles.q_full.index(GROUP), turn & 1)
            turn += 1
            if high > low:
                _wait_full(tiles.k_full, step, work, True)
                _wait_turn(GROUP)
                products = _start_scores(q, tiles, step, work, S_LAYOUT)
                _pass_turn(GROUP, work.NUM_GROUPS)
                s = scores.capped(warpgroup_mma_wait(0, deps=[products]))
                _leave(tiles.k_empty, step, work)
                s = work.visible(s, position, (high - 1) * work.BLOCK_N, Sk, S_LAYOUT)
                m_i = _row_max(s, ROWS)
                shift = gl.where(m_i == float("-inf"), 0.0, m_i * unit)
                p = gl.exp2(s * unit - shift[:, None])
                l_i = _partial_sum(p)
                p = gl.convert_layout(p.to(dtype), P_LAYOUT)
                _wait_full(tiles.k_full, step + 1, work, high - 1 > low)
                for n in range(high - 2, low - 1, -1):
                    _clear_unseen(tiles, step, (n + 1) * work.BLOCK_N, low_seen, high_seen, work, GROUP)
                    step += 1
                    _wait_turn(GROUP)
                    products = _start_scores(q, tiles, step, work, S_LAYOUT)
                    values = _start_values(p, acc, tiles, step - 1, work)
                    _pass_turn(GROUP, work.NUM_GROUPS)
                    s = scores.capped(warpgroup_mma_wait(1, deps=[products]))
                    _leave(tiles.k_empty, step, work)
                    if n < low_full or n >= high_full:
                        s = work.visible(s, position, n * work.BLOCK_N, Sk, S_LAYOUT)
                    m_new = gl.maximum(m_i, _row_max(s, ROWS))
                    shift = gl.where(m_new == float("-inf"), 0.0, m_new * unit)
                    alpha = gl.exp2(m_i * unit - shift)
                    p = gl.exp2(s * unit - shift[:, None])
                    l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + _partial_sum(p)
                    p = gl.convert_layout(p.to(dtype), P_LAYOUT)
                    m_i = m_new
                    # The compiler would move the wait for the value product up, before the softmax, and so undo their
                    # overlap. It does not move it over this other wait.
                    _wait_full(tiles.k_full, step + 1, work, n > low)
                    acc = warpgroup_mma_wait(0, deps=[values])
                    _leave(tiles.v_empty, step - 1, work)
                    acc = acc * gl.convert_layout(alpha, OUT_ROWS)[:, None]
                if not OUT_IN_Q:
                    mbarrier.arrive(tiles.q_empty.index(GROUP))
                _clear_unseen(tiles, step, low * work.BLOCK_N, low_seen, high_seen, work, GROUP)
                values = _start_values(p, acc, tiles, step, work)
                acc = warpgroup_mma_wait(0, deps=[values])
                _leave(tiles.v_empty, step, work)
                step += 1
            else:
                if not OUT_IN_Q:
                    mbarrier.arrive(tiles.q_empty.index(GROUP))
            total = gl.convert_layout(gl.sum(l_i, 1), ROWS)
            m_log2 = m_i * unit
            if HAS_SINKS:
                sink = gl.load(result.sinks_ptr + h).to(gl.float32) * LOG2E
                top = gl.maximum(m_log2, sink)
                alpha = gl.exp2(m_log2 - top)
                total = total * alpha + gl.exp2(sink - top)
                acc = acc * gl.convert_layout(alpha, OUT_ROWS)[:, None]
                m_log2 = top
            lse = gl.where(total == 0.0, float("-inf"), (m_log2 + gl.log2(total)) / LOG2E)
            inverse = gl.where(total == 0.0, 0.0, scores.value_unit(b, h, work.H) / total)
            row = first_query + gl.arange(0, GROUP_M, ROWS)
            place_b = b
            if work.IS_VARLEN:
                place_b = 0
            lse_row = result.lse_ptr + (place_b * work.H + h).to(gl.int64) * result.lse_length + start_q
            gl.store(lse_row + row, lse, mask=row < Sq)
            out = (acc * gl.convert_layout(inverse, OUT_ROWS)[:, None]).to(dtype)
            if work.IS_VARLEN and first_query + GROUP_M > Sq:  # the next rows are another sequence's
                rows = (first_query + gl.arange(0, GROUP_M, OUT_ROWS))[:, None]
                column = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, OUT_LAYOUT))[None, :]
                place = ((start_q + rows).to(gl.int64) * work.H + h) * result.DV
                gl.store(result.out_ptr + place + column, out, mask=(rows < Sq) & (column < result.DV))
            else:
                if not OUT_IN_Q:
                    tma.store_wait(0)
                _matrix(tiles.out.index(GROUP)).store(out)
                fence_async_shared()
                tma.async_copy_shared_to_global(
                    result.out_desc, [place_b, h, start_q + first_query, 0], tiles.out.index(GROUP)
                )
            if OUT_IN_Q:
                tma.store_wait(0)
                mbarrier.arrive(tiles.q_empty.index(GROUP))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["lse_length", "Sq", "Sk", "H", "num_m", "num_tiles", "section", "window_left", "window_right",
                       "queries_per_kv", "scale_rows"]
)  # fmt: skip
def _attention_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, sinks_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    cu_q_ptr, cu_k_ptr,
    lse_length, Sq, Sk, H, num_m, num_tiles, section, window_left, window_right, queries_per_kv, scale_rows,
    scale_log2, softcap_scale, softcap_log2,
    DV: gl.constexpr, BLOCK_N: gl.constexpr, IS_VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr, HAS_SCALES: gl.constexpr, HAS_SINKS: gl.constexpr, NUM_GROUPS: gl.constexpr,
    NUM_STAGES: gl.constexpr, OUT_IN_Q: gl.constexpr,
):  # fmt: skip
    """One persistent block computes a query tile in every round."""
    q = gl.allocate_shared_memory(q_desc.dtype, [NUM_GROUPS] + q_desc.block_type.shape, q_desc.layout)
    if OUT_IN_Q:
        out = q
    else:
        out = gl.allocate_shared_memory(out_desc.dtype, [NUM_GROUPS] + out_desc.block_type.shape, out_desc.layout)
    tiles = Tiles(
        q,
        gl.allocate_shared_memory(k_desc.dtype, [NUM_STAGES] + k_desc.block_type.shape, k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [NUM_STAGES] + v_desc.block_type.shape, v_desc.layout),
        out,
        barriers(NUM_GROUPS, 1),
        barriers(NUM_GROUPS, 1),
        barriers(NUM_STAGES, 1),
        barriers(NUM_STAGES, NUM_GROUPS),
        barriers(NUM_STAGES, 1),
        barriers(NUM_STAGES, NUM_GROUPS),
    )
    fence_async_shared()
    if not IS_VARLEN:  # never read
        cu_q_ptr = lse_ptr
        cu_k_ptr = lse_ptr
    if not HAS_SINKS:
        sinks_ptr = lse_ptr
    if not HAS_SCALES:
        q_scale_ptr = lse_ptr
        k_scale_ptr = lse_ptr
        v_scale_ptr = lse_ptr
    work = Work(
        cu_q_ptr, cu_k_ptr, Sq, Sk, H, num_m, num_tiles, section, window_left, window_right,
        BLOCK_N, IS_VARLEN, HAS_LEFT, NUM_GROUPS, NUM_STAGES,
    )  # fmt: skip
    scores = Scores(
        scale_log2, softcap_scale, softcap_log2, q_scale_ptr, k_scale_ptr, v_scale_ptr, scale_rows, queries_per_kv,
        HAS_SOFTCAP, HAS_SCALES,
    )  # fmt: skip
    result = Result(out_desc, out_ptr, lse_ptr, lse_length, sinks_ptr, DV)
    # Compile-time values stand in the tuples: an assignment to a variable would make run-time values of them.
    if NUM_GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (result, scores, tiles, work, FIRST, HAS_SINKS, OUT_IN_Q)),
                (_consume, (result, scores, tiles, work, SECOND, HAS_SINKS, OUT_IN_Q)),
                (_produce, (q_desc, k_desc, v_desc, queries_per_kv, tiles, work)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (result, scores, tiles, work, FIRST, HAS_SINKS, OUT_IN_Q)),
                (_consume, (result, scores, tiles, work, SECOND, HAS_SINKS, OUT_IN_Q)),
                (_consume, (result, scores, tiles, work, THIRD, HAS_SINKS, OUT_IN_Q)),
                (_produce, (q_desc, k_desc, v_desc, queries_per_kv, tiles, work)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )

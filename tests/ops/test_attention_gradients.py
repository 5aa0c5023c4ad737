"""The backward kernels of attention: accuracy, planted faults, and what must not happen."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedops import attention, attention_varlen
from fusedops._core.device import MIN_CAPABILITY, TARGETS
from fusedops.ops.attention._triton import backward, backward_launch
from fusedops.testing import assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import Fault
from fusedops.testing.inputs import huge_stride_rows
from tests.ops.attention_gradients import Gradients
from tests.ops.attention_problems import FEATURES, Problem, packed_lengths, packed_problems, problems, qkv
from tests.ops.common import DTYPES, EVERY_KERNEL, gradients, using

INF, NAN = float("inf"), float("nan")
SETS = pytest.mark.parametrize("features", [(name,) for name in FEATURES[1:]] + [FEATURES], ids="+".join)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 queries and keys: every loop runs more than once."""
    force_tiles(monkeypatch)


def force_tiles(monkeypatch, two_passes=False):
    tile = backward_launch.BackwardConfig(16, 16, 4, 1)
    monkeypatch.setattr(backward_launch, "default", lambda *args: (replace(tile, two_passes=two_passes), tile))


# ---- accuracy


@EVERY_KERNEL
@EVERY_DTYPE
@pytest.mark.parametrize("features", [("bounds", "scores"), FEATURES], ids="+".join)
@given(data=st.data())
def test_gradients(implementation, dtype, features, data):
    problem = data.draw(problems(dtype, features, max_pairs=1000, head_dims=(8, 16, 40, 64), hot=False))
    layout = data.draw(strategies.layouts(4))
    drawn = Gradients.draw(problem, data.draw(strategies.seeds()), data.draw(st.booleans()), layout)
    with using(implementation):
        found = drawn.run_backward()
    drawn.check(found)


@pytest.mark.usefixtures("small_tiles")
@EVERY_DTYPE
@given(data=st.data())
def test_gradients_of_many_blocks(dtype, data):
    problem = data.draw(problems(dtype, FEATURES, max_pairs=1500, head_dims=(8, 40), hot=False))
    drawn = Gradients.draw(problem, data.draw(strategies.seeds()), data.draw(st.booleans()))
    with pytest.MonkeyPatch.context() as patch, using("triton"):
        force_tiles(patch, two_passes=data.draw(st.booleans()))
        found = drawn.run_backward()
    drawn.check(found)


@given(data=st.data())
def test_gradients_of_packed_sequences(data):
    """Each is that of its sequence alone; float32, where a wrong row stands out."""
    problem = data.draw(packed_problems(torch.float32, max_length=24).filter(lambda p: len(p.lengths[0]) > 1))
    drawn = Gradients.draw(problem, data.draw(strategies.seeds()), data.draw(st.booleans()))
    with pytest.MonkeyPatch.context() as patch, using("triton"):
        force_tiles(patch, two_passes=data.draw(st.booleans()))
        found = drawn.run()
    for result, wanted in zip(found, drawn.truth(), strict=True):
        if wanted is not None:
            torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "head_dim, value_dim", [(40, 40), (72, 72), (80, 16), (96, 104), (104, 96), (192, 128), (512, 8)]
)
@EVERY_DTYPE
def test_head_dims_between_powers_of_two(dtype, head_dim, value_dim):
    """B32: four times the same bits, in memory that was filled with NaN (Dao-AILab/flash-attention#2896)."""
    problem = Problem(*qkv(1, 9, 21, head_dim=head_dim, value_dim=value_dim, dtype=dtype), {"causal": True})
    drawn = Gradients.draw(problem)
    with using("triton"):
        results = [drawn.run()[:3] for _ in range(4)]
    drawn.check([*results[0], None])
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0]))


# ---- properties


def every_option(heads, num_queries, num_keys, dtype=torch.float32):
    """Options that use every argument of the kernels."""
    mask = make_tensor((1, heads, num_queries, num_keys), torch.float32, seed=11).to(dtype)
    options = {
        "window_size": (num_keys // 2, 3), "softcap": 2.0, "sinks": make_tensor((heads,), torch.float32, seed=12),
        "alibi_slopes": make_tensor((heads,), torch.float32, seed=13) * 0.1,
        "mask": mask.masked_fill(mask > 1.0, -INF),
    }  # fmt: skip
    return options


@pytest.mark.usefixtures("small_tiles")
@EVERY_DTYPE
def test_repeatable(dtype):
    """No atomics: a second run gives the same bits."""
    drawn = Gradients.draw(Problem(*qkv(2, 35, 50, heads=4, kv_heads=2, dtype=dtype), every_option(4, 35, 50, dtype)))
    with using("triton"):
        first, second = drawn.run(), drawn.run()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 2)}], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys(options, sinks):
    """B01, B02: more queries than keys give no NaN (Dao-AILab/flash-attention#443, #1778) and rows without keys 0."""
    if sinks:
        options = {**options, "sinks": torch.tensor([0.5, -1.0])}
    drawn = Gradients.draw(Problem(*qkv(2, 90, 20), options))
    with using("triton"):
        found = drawn.run()
    drawn.check(found)
    _, lse = Problem(drawn.problem.q, drawn.problem.k, drawn.problem.v, {**options, "sinks": None}).truth()
    empty = lse.isneginf().transpose(1, 2)
    assert empty.any() == bool(options.keys() & {"causal", "window_size"}) and not found[0][empty].any()


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gradients_that_come_from_rows_without_keys_vanish(bad):
    """What stands in grad_lse of such a row (the gradient of exp(-inf), say) does not matter."""
    drawn = Gradients.draw(Problem(*qkv(1, 30, 10), {"causal": True}))
    with using("triton"):
        expected = drawn.run()
        drawn.grad_lse[..., :20] = bad
        found = drawn.run()
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected))


def test_a_sink_of_minus_infinity_is_none():
    """Also in rows without keys, whose lse is -inf then: exp(-inf - -inf) is NaN."""
    tensors = qkv(1, 30, 10)
    without = Gradients.draw(Problem(*tensors, {"causal": True}))
    drawn = Gradients.draw(Problem(*tensors, {"causal": True, "sinks": torch.full((2,), -INF)}))
    with using("triton"):
        expected, found = without.run(), drawn.run()
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected)) and torch.equal(found[3], torch.zeros(2))


@EVERY_KERNEL
@pytest.mark.parametrize("empty", ["first", "middle", "last", "all"])
def test_zero_lengths(implementation, empty):
    """B09: sequences without queries or without keys (Dao-AILab/flash-attention#2562, #2421, #1713)."""
    none, some = [(0, 5), (4, 0), (0, 0)], [(7, 9), (20, 17)]
    pairs = {"first": none + some, "middle": [some[0], *none, some[1]], "last": some + none, "all": none}[empty]
    totals = [sum(pair[side] for pair in pairs) for side in (0, 1)]
    q, k, v = (t[0] for t in qkv(1, *totals, seed=1))
    sinks = torch.tensor([0.5, -1.0])
    drawn = Gradients.draw(Problem(q, k, v, {"causal": True, "sinks": sinks}, packed_lengths(pairs)))
    with using(implementation):
        found = drawn.run()
    for result, wanted in zip(found, drawn.truth(), strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
def test_empty(sizes):
    drawn = Gradients.draw(Problem(*qkv(*sizes), {"sinks": torch.tensor([0.5, -1.0])}))
    with using("triton"):
        found = drawn.run()
    for result, wanted in zip(found, drawn.truth(), strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("hidden", ["bool", "additive", "window", "slack"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_unseen_keys_change_nothing(hidden, bad):
    """Bitwise: 0 * NaN is NaN, in the products of dq and dk as in that of out (Dao-AILab/flash-attention#1745)."""
    q, k, v = qkv(2, 40, 70, seed=3)
    options, keys = {}, slice(16, 30)
    if hidden == "window":
        options = {"window_size": (0, -1)}  # query 0 stands at 30
    elif hidden == "slack":
        keys = slice(70, 96)
        k, v = (torch.cat((t, torch.zeros(2, 26, 1, 16)), 1) for t in (k, v))
    else:
        visible = torch.ones(2, 1, 1, 70, dtype=torch.bool)
        visible[..., keys] = False
        options["mask"] = visible if hidden == "bool" else torch.where(visible, 0.25, -INF)
    results = []
    for value in (0.0, bad):
        k[:, keys], v[:, keys] = value, value
        with using("triton"):
            results.append(Gradients.draw(Problem(q, k[:, :70], v[:, :70], options)).run())
    assert all(t is None or t.isfinite().all() for t in results[0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][:3], results[1][:3]))


def test_nan_in_sight_reaches_its_rows_and_keys():
    q, k, v = qkv(1, 40, 40, heads=2)
    q[0, 30, 1, 3] = NAN
    drawn = Gradients.draw(Problem(q, k, v, {"causal": True}))
    with using("triton"):
        dq, dk, dv, _ = drawn.run()
    assert dq[0, 30, 1].isnan().all() and dq[0, :, 0].isfinite().all() and dq[0, :30, 1].isfinite().all()
    assert dk[0, :31].isnan().all() and dv[0, :31].isnan().all()


# ---- layouts


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", ["padded", "sliced", "transposed", "offset:3", "expanded", "strided"])
def test_layouts_of_grad_out_give_the_same_bits(layout):
    drawn = Gradients.draw(Problem(*qkv(2, 21, 30), {"causal": True}), layout=layout)
    copied = Gradients(drawn.problem, drawn.grad_out.contiguous(), drawn.grad_lse.mT.contiguous().mT)
    with using("triton"):
        found, expected = drawn.run(), copied.run()
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected))


def test_gradient_of_a_sum():
    """B17: `.sum().backward()` expands one element to every stride 0 (Dao-AILab/flash-attention#2611)."""
    q, k, v = (t.requires_grad_() for t in qkv(2, 17, 21))
    with using("triton"):
        out, lse = attention(q, k, v, return_lse=True)
        (out.sum() + lse.sum()).backward()
    drawn = Gradients(Problem(*(t.detach() for t in (q, k, v))), torch.ones(out.shape), torch.ones(lse.shape))
    drawn.check([q.grad, k.grad, v.grad, None])


def test_rows_further_apart_than_int32():
    """B12, B17: strides beyond 2**31 elements in every operand (triton-lang/triton#832)."""
    near = [make_tensor((3, 16), torch.float16, seed=i) for i in range(4)]
    far = [huge_stride_rows(t, last_offset=2**31 + 2)[None, :, None] for t in near]
    with using("triton"):
        expected = gradients(lambda *t: attention(*t), [t[None, :, None] for t in near[:3]], near[3][None, :, None])
        leaves = [t.requires_grad_() for t in far[:3]]
        found = torch.autograd.grad(attention(*leaves), leaves, far[3])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@EVERY_DTYPE
def test_torch_compile(dtype):
    """Forward and backward in one graph each, packed ones too."""
    q, k, v = (t.requires_grad_() for t in qkv(2, 17, 21, dtype=dtype))
    lengths = packed_lengths([(17, 21)] * 2)

    def dense(q, k, v):
        return attention(q, k, v, causal=True, softcap=3.0)

    def packed(q, k, v):
        return attention_varlen(*(t.flatten(0, 1) for t in (q, k, v)), *lengths, causal=True)

    with using("triton"):
        for function in (dense, packed):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, dynamic=True)
            found = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
            expected = torch.autograd.grad(function(q, k, v).square().sum(), (q, k, v))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- configurations


@pytest.mark.parametrize(
    "target", [t for t in TARGETS.values() if t.capability >= MIN_CAPABILITY], ids=lambda t: t.arch
)
def test_configurations(target):
    """Tiles are those that products can take, and equal values for equal calls."""
    for width in (16, 32, 64, 128, 256, 512):
        for size in (2, 4):
            if (width, size) == (512, 4) and target.shared_memory < backward_launch.FLOAT32_512_SHARED:
                with pytest.raises(
                    NotImplementedError, match="beyond 256 in float32 need 132096 bytes of shared memory"
                ):
                    backward_launch.default(width, size, False, "none", target)
                continue
            for options in ((False, "none"), (True, "none"), (False, "bool"), (True, "additive")):
                pair = backward_launch.default(width, size, *options, target)
                assert pair == backward_launch.default(width, size, *options, target) and len({*pair}) in (1, 2)
                for tile in pair:
                    assert {tile.block_m, tile.block_n} <= {16, 32, 64, 128}


# ---- planted faults: the kernels' own source with one thing wrong

SOURCE = Path(backward.__file__).read_text()
FAULTS = {
    "dk without the scale": ("dk * softmax_scale, D)", "dk, D)"),
    "dq without the scale": ("dq * softmax_scale, D)", "dq, D)"),
    "dv scaled": ("mask_n, dv, DV)", "mask_n, dv * softmax_scale, DV)"),
    "dv without the weights": ("tl.dot(p.to(grad_out.dtype)", "tl.dot((p * 0.0 + 0.1).to(grad_out.dtype)"),
    "dv of the scores' gradient": ("tl.dot(p.to(grad_out.dtype)", "tl.dot(ds.to(grad_out.dtype)"),
    "dk of the weights": ("tl.dot(ds.to(q.dtype), q", "tl.dot(p.to(q.dtype), q"),
    "softcap's derivative left out": ("ds *= 1.0 - (capped / softcap) * (capped / softcap)", "ds *= 1.0"),
    "softcap's derivative of the capped score": ("(capped / softcap) * (capped / softcap)", "capped * capped"),
    "delta added in dk": ("- delta[None, :]", "+ delta[None, :]"),
    "delta added in dq": ("- delta[:, None]", "+ delta[:, None]"),
    "delta of another head": ("delta_ptr + head * stride_row_h", "delta_ptr"),
    "grad_lse ignored": ("delta -= tl.load(", "tl.load("),
    "grad_lse's sign": ("delta -= tl.load(", "delta += tl.load("),
    "sinks' sign": ("-tl.sum(terms", "tl.sum(terms"),
    "sinks without their weight": ("weight * delta", "delta"),
    "sinks of another head": ("sinks_ptr + h)", "sinks_ptr)"),
    "dq of another key head": ("hk = h // group", "hk = h % (H // group)"),
    "dk of the wrong group": ("h = hk * group", "h = hk"),
    "dk of the first head of each group": ("for step in range(group * count)", "for step in range(count)"),
    "last key dropped": ("offs_n < last_key)", "offs_n < last_key - 1)"),
    "first key block not advanced": ("first + step * BLOCK_N", "first"),
    "first query block not advanced": ("first + step % count * BLOCK_M", "first"),
    "blocks beyond the whole ones forgotten": ("start_n >= skip_from, skip, 0", "start_n >= skip_from, 0, 0"),
    "last block of queries dropped": ("tl.cdiv(end - start - full, BLOCK_M)", "(end - start - full) // BLOCK_M"),
    "window one key later": ("pos_m = offs_m + (Sk - Sq)", "pos_m = offs_m + (Sk - Sq) + 1"),
    "window one key earlier": ("pos_m = offs_m + (Sk - Sq)", "pos_m = offs_m + (Sk - Sq) - 1"),
    "positions from the first key": ("pos_m = offs_m + (Sk - Sq)", "pos_m = offs_m"),
    "hidden pairs in ds": ("ds = tl.where(visible, ds, 0.0)", "ds = ds"),
    "hidden pairs in dv": ("p = tl.where(visible, p, 0.0)", "p = p"),
    "additive mask in base 2": ("tl.exp2((s - lse) * LOG2E)", "tl.exp2(s - lse)"),
    "mask of the first head": ("mask_ptr + head * stride_mask_h", "mask_ptr"),
    "slope of the first head": ("tl.load(alibi_ptr + head * stride_alibi_h)", "tl.load(alibi_ptr)"),
    "weights rounded to 16 bits": ("    ds = p * dp\n", "    ds = p * dp\n    p = p.to(tl.float16).to(tl.float32)\n"),
    "weights of unscaled scores": ("scaled(qk, softmax_scale, softcap", "scaled(qk, 1.0, softcap"),
    "weights in the wrong base": ("scaled(qk, softmax_scale * LOG2E", "scaled(qk, softmax_scale"),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Modules like `backward`, each with one fault."""
    folder = tmp_path_factory.mktemp("faults")
    modules = {}
    for number, (name, (right, wrong)) in enumerate(FAULTS.items()):
        assert right in SOURCE, f"{name}: the kernels no longer say {right!r}"
        path = folder / f"backward_{number}.py"
        path.write_text(SOURCE.replace(right, wrong))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


@pytest.mark.slow
def test_planted_faults_are_rejected(faults):
    """Two problems that together use every option, in float32: the faults stand far above its rounding."""
    cases = [
        Gradients.draw(Problem(*qkv(1, 21, 33, heads=4, kv_heads=2), every_option(4, 21, 33))),
        Gradients.draw(Problem(*qkv(1, 37, 40), {"causal": True, "softmax_scale": 0.4})),
    ]

    def by(module):
        def run(case):
            with pytest.MonkeyPatch.context() as patch, using("triton"):
                force_tiles(patch)
                for kernel in ("_attention_delta_kernel", "_attention_dkdv_kernel", "_attention_dq_kernel"):
                    patch.setattr(backward_launch, kernel, getattr(module, kernel))
                return case.run_backward()

        return run

    def check(candidate):
        for case in cases:
            case.check(candidate(case))

    planted = [Fault(name, by(module)) for name, module in faults.items()]
    assert_faults_rejected(check, by(backward), planted, minimum=30)

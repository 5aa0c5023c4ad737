"""prune_24, is_24, compress_24, decompress_24."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops import compress_24, counters, decompress_24, is_24, prune_24
from fusedops._core import env
from fusedops._core.register import operators
from fusedops.ops.compress_24 import _torch
from fusedops.testing import Fault, assert_faults_rejected, make_tensor, strategies
from fusedops.testing.faults import metadata_faults, standard_faults
from tests.ops.common import assert_compiles, assert_fake_like_real, assert_rejected, opcheck, using
from tests.ops.sparse_problems import EVERY_DTYPE, FP8, masked

EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["torch", "reference"])
EACH_DTYPE = pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
NAN, INF = float("nan"), float("inf")
LAYOUTS = st.one_of(strategies.layouts(2), st.just("strided"))


def bits(tensor):
    """Something that compares equal where every bit is."""
    return torch.atleast_1d(tensor).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def layout_of(tensor, name):
    """The same numbers in a layout that is drawn, or transposed."""
    if name == "strided":
        return tensor.T.contiguous().T
    if name == "expanded" and not len(tensor):
        return tensor
    return make_tensor(tensor.shape, tensor.dtype, seed=0, layout=name).copy_(tensor) if name != "expanded" else tensor


def by_hand(weight):
    """values and metadata by loops over numbers: the format as it is written down."""
    N, K = weight.shape
    columns = -(-K // 64) * 64
    values, metadata = [], []
    for row in weight.double().tolist():
        row = row + [0.0] * (columns - K)
        kept, nibbles = [], []
        for first in range(0, columns, 4):
            wanted = [i for i in range(4) if row[first + i] != 0]
            i, j = sorted((wanted + [i for i in range(4) if i not in wanted])[:2])
            kept += [row[first + i], row[first + j]]
            nibbles.append(i | j << 2)
        nibbles += [4] * (-len(nibbles) % 32)
        values.append(kept)
        metadata.append([low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2])])
    return (
        torch.tensor(values, dtype=torch.float64).view(N, columns // 2).to(weight.dtype),
        torch.tensor(metadata, dtype=torch.uint8).view(N, -(-K // 128) * 16),
    )


@st.composite
def weights(draw, kept=2):
    """Weights with at most so many numbers of each four, among them special ones."""
    dtype = draw(st.sampled_from(EVERY_DTYPE))
    columns = st.one_of(st.integers(0, 140), st.sampled_from([64, 127, 128, 129, 256]))
    shape = draw(st.tuples(st.integers(0, 5), columns))
    finite = () if dtype in (torch.int8, FP8) else draw(strategies.specials(torch.float16))
    seed = draw(strategies.seeds())
    weight = make_tensor(shape, dtype, seed=seed, magnitude=100.0, specials=finite if 0 not in shape else ())
    return layout_of(masked(weight, seed, kept), draw(LAYOUTS))


# ---- accuracy


@EVERY_IMPLEMENTATION
@given(weight=weights())
def test_there_and_back(implementation, weight):
    """B38: pytorch/pytorch#109175, #110664: wrong numbers of weights that were not contiguous. Equal in every bit."""
    N, K = weight.shape
    with using(implementation):
        values, metadata = compress_24(weight)
        assert values.shape == (N, -(-K // 64) * 32) and metadata.shape == (N, -(-K // 128) * 16)
        assert values.is_contiguous() and metadata.is_contiguous() and metadata.dtype == torch.uint8
        dense = decompress_24(values, metadata, in_features=K)
        assert dense.is_contiguous() and dense.dtype == weight.dtype
        torch.testing.assert_close(dense.double(), weight.double(), rtol=0, atol=0, equal_nan=True)
        padded = decompress_24(values, metadata)
        assert padded.shape == (N, -(-K // 64) * 64)
        assert same_bits(padded[:, :K], dense) and not padded[:, K:].double().any()
        assert all(same_bits(*pair) for pair in zip(compress_24(dense), (values, metadata), strict=True))
        assert is_24(weight) and same_bits(prune_24(weight).double() + 0.0, weight.double() + 0.0)


@EVERY_IMPLEMENTATION
@given(weight=weights())
def test_the_format_is_what_is_written_down(implementation, weight):
    with using(implementation):
        values, metadata = compress_24(weight)
    wanted = by_hand(weight)
    assert torch.equal(metadata, wanted[1])
    torch.testing.assert_close(values.double(), wanted[0].double(), rtol=0, atol=0, equal_nan=True)


@EVERY_IMPLEMENTATION
@given(weight=weights(kept=4), with_scores=st.booleans(), seed=strategies.seeds(), ties=st.booleans())
def test_what_is_kept_has_the_larger_scores(implementation, weight, with_scores, seed, ties):
    N, K = weight.shape
    scores = None
    if with_scores:
        scores = make_tensor((N, K), torch.float32, seed=seed)
        scores = scores.sign() if ties else scores
    with using(implementation):
        pruned = prune_24(weight, scores=scores)
        assert is_24(pruned) and pruned.is_contiguous()
    wanted = weight.double().abs().nan_to_num(nan=2e308, posinf=1e308) if scores is None else scores.double()
    kept = torch.zeros(N, K, dtype=torch.bool)
    for row, numbers in enumerate(wanted.tolist()):
        for first in range(0, K, 4):
            group = numbers[first : first + 4]
            for i in sorted(range(len(group)), key=lambda i: (-group[i], i))[:2]:
                kept[row, first + i] = True
    assert same_bits(pruned.double(), torch.where(kept, weight.double(), 0.0))


@EVERY_IMPLEMENTATION
def test_every_pattern_of_a_group(implementation):
    """Sixteen patterns: eleven have a compressed form, which is unique; the others are refused."""
    places = {0b0000: (0, 1), 0b0001: (0, 1), 0b0010: (0, 1), 0b0100: (0, 2), 0b1000: (0, 3), 0b0011: (0, 1)}
    places |= {0b0101: (0, 2), 0b1001: (0, 3), 0b0110: (1, 2), 0b1010: (1, 3), 0b1100: (2, 3)}
    with using(implementation):
        for pattern in range(16):
            group = torch.tensor([[float(i + 1) if pattern >> i & 1 else 0.0 for i in range(4)]])
            assert is_24(group) == (pattern in places)
            if pattern not in places:
                with pytest.raises(ValueError, match=f"got {pattern.bit_count()} in row 0, group 0"):
                    compress_24(group)
                continue
            values, metadata = compress_24(group)
            i, j = places[pattern]
            assert metadata[0].tolist() == [0x40 | i | j << 2] + [0x44] * 15
            assert values[0, :2].tolist() == [group[0, i], group[0, j]] and not values[0, 2:].any()


def test_planted_faults_are_rejected():
    weight = masked(make_tensor((6, 150), torch.float32, seed=1), 2)
    wanted = by_hand(weight)

    def check(candidate):
        values, metadata = candidate(weight)
        assert torch.equal(values, wanted[0]) and torch.equal(metadata, wanted[1])
        assert torch.equal(decompress_24(values, metadata, in_features=150), weight)

    def correct(weight):
        return compress_24(weight)

    def of_values(change):
        return lambda weight: (change(correct(weight)[0]).contiguous(), correct(weight)[1])

    def of_metadata(change):
        return lambda weight: (correct(weight)[0], change(correct(weight)[1]).contiguous())

    def swapped(v):
        return v.unflatten(1, (-1, 2)).flip(-1).flatten(1)

    faults = {
        "pairs swapped": of_values(swapped),
        "first of each pair twice": of_values(lambda v: v[:, ::2].repeat_interleave(2, 1)),
        "rows shifted": of_values(lambda v: v.roll(1, 0)),
        "columns shifted": of_values(lambda v: v.roll(1, 1)),
        "groups shifted": of_values(lambda v: v.roll(2, 1)),
        "values rounded": of_values(lambda v: v.bfloat16().float()),
        "negated": of_values(torch.neg),
        "last group lost": of_values(lambda v: torch.cat((v[:, :74], torch.zeros(6, 22)), 1)),
        "padding not zero": of_values(lambda v: torch.cat((v[:, :76], torch.ones(6, 20)), 1)),
        "padding of metadata zero": of_metadata(lambda m: torch.cat((m[:, :24], torch.zeros(6, 8).byte()), 1)),
        "halves of a byte swapped": of_metadata(lambda m: m << 4 | m >> 4),
        "places swapped, and values too": lambda w: (
            swapped(correct(w)[0]), (correct(w)[1] & 0x33) << 2 | correct(w)[1] >> 2 & 0x33
        ),
        "rows of metadata shifted": of_metadata(lambda m: m.roll(1, 0)),
        "metadata of 16-bit words": of_metadata(lambda m: m.unflatten(1, (-1, 2)).flip(-1).flatten(1)),
        "always the first two": of_metadata(lambda m: torch.full_like(m, 0x44)),
        "bytes of metadata reversed": of_metadata(lambda m: m.flip(1)),
    }  # fmt: skip
    assert_faults_rejected(check, correct, [Fault(name, wrong) for name, wrong in faults.items()])


def test_planted_faults_of_the_way_back_are_rejected():
    weight = masked(make_tensor((6, 150), torch.float32, seed=1), 2)
    values, metadata = compress_24(weight)

    def check(candidate):
        assert torch.equal(candidate(values, metadata), weight)

    def correct(values, metadata):
        return decompress_24(values, metadata, in_features=150)

    assert_faults_rejected(check, correct, metadata_faults(correct, 1) + standard_faults(correct), minimum=30)


# ---- properties


@EVERY_IMPLEMENTATION
@EACH_DTYPE
def test_zeros_have_no_sign_and_nan_is_a_number(implementation, dtype):
    with using(implementation):
        if dtype != torch.int8:
            zeros = torch.tensor([[1.0, -0.0, 2.0, -0.0]]).to(dtype)
            assert is_24(zeros) and compress_24(zeros)[1][0, 0] == 0x48
            assert not is_24(torch.tensor([[1.0, NAN, 2.0, 0.0]]).to(dtype))
            pruned = prune_24(torch.tensor([[1.0, NAN, 2.0, 3.0]]).to(dtype))
            assert pruned[0, 1].isnan() and pruned.double().nan_to_num(9.0).tolist() == [[0.0, 9.0, 0.0, 3.0]]
        smallest = torch.ones(1, 3, dtype=torch.int8) if dtype == torch.int8 else torch.zeros(1, 3).to(dtype)
        if dtype != torch.int8:
            smallest.view(torch.uint8)[:, :: smallest.element_size()] = 1  # the least denormal, which some would flush
        assert not is_24(smallest) and is_24(smallest[:, :2])


@EVERY_IMPLEMENTATION
def test_the_absolute_value_of_the_least_int8(implementation):
    weight = torch.tensor([[-128, 127, 126, -127]], dtype=torch.int8)
    with using(implementation):
        assert prune_24(weight).tolist() == [[-128, 127, 0, 0]]


@EVERY_IMPLEMENTATION
def test_what_is_left_of_a_group_keeps_two(implementation):
    with using(implementation):
        assert prune_24(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[0.0, 2.0, 3.0]]
        assert prune_24(torch.tensor([[1.0]]), scores=torch.tensor([[-INF]])).tolist() == [[1.0]]
        with pytest.raises(ValueError, match=r"got 3 in row 1, group 2 \(columns 8 to 10\)"):
            compress_24(torch.tensor([[0.0] * 11, [0.0] * 8 + [1.0] * 3]))


def test_many_rows_are_worked_on_in_parts(monkeypatch):
    """Every function in chunks of two rows, the error's row among them."""
    weight = make_tensor((7, 20), torch.float32, seed=0)
    whole = [prune_24(weight), *compress_24(prune_24(weight))]
    monkeypatch.setattr("fusedops.ops.compress_24._torch.CHUNK", 40)
    parts = [prune_24(weight), *compress_24(prune_24(weight))]
    assert all(same_bits(a, b) for a, b in zip(whole, parts, strict=True))
    assert same_bits(decompress_24(*parts[1:], in_features=20), whole[0]) and is_24(whole[0])
    whole[0][5, 16:] = 1.0
    assert not is_24(whole[0])
    with pytest.raises(ValueError, match=r"got 4 in row 5, group 4 \(columns 16 to 19\)"):
        compress_24(whole[0])


def test_tables_are_made_on_the_cpu_whatever_the_default_is():
    _torch._places_of_patterns.cache_clear()
    weight = prune_24(torch.ones(2, 8))
    with torch.device("meta"):
        values, metadata = compress_24(weight)
    assert torch.equal(decompress_24(values, metadata, in_features=8), weight)


def test_nothing_given_is_changed():
    weight, scores = make_tensor((4, 30), torch.float32, seed=1), make_tensor((4, 30), torch.float32, seed=2)
    kept = weight.clone(), scores.clone()
    values, metadata = compress_24(prune_24(weight, scores=scores))
    before = values.clone(), metadata.clone()
    dense = decompress_24(values, metadata)
    dense.zero_()
    assert all(torch.equal(a, b) for a, b in zip((weight, scores, values, metadata), kept + before, strict=True))


# ---- rejects

W = torch.zeros(3, 100)
V, M = compress_24(W)
REJECTS = [
    (lambda: prune_24([1]), TypeError, "prune_24: weight must be a torch.Tensor, got list"),
    (lambda: prune_24(torch.ones(4)), ValueError, r"prune_24: weight must have shape \[N, K\], got \[4\]"),
    (lambda: prune_24(W.double()), TypeError, "prune_24: weight must be float16, bfloat16, float32, int8 or float8"),
    (lambda: prune_24(W, scores=W[:, :99]), ValueError, r"scores must have shape \[N, K\] with N=3, K=100, got"),
    (lambda: prune_24(W, scores=W[0]), ValueError, r"scores must have shape \[N, K\] .* got \[100\]"),
    (lambda: prune_24(W, scores=W.int()), TypeError, "scores must be float16, bfloat16, float32 or float64, got int32"),
    (lambda: prune_24(W, scores=W.to("meta")), ValueError, "prune_24: scores must be on cpu, got meta"),
    (lambda: is_24(3), TypeError, "is_24: weight must be a torch.Tensor, got int"),
    (lambda: is_24(W.int()), TypeError, "is_24: weight must be float16, bfloat16, .* got int32"),
    (lambda: compress_24(W[None]), ValueError, r"compress_24: weight must have shape \[N, K\], got \[1, 3, 100\]"),
    (lambda: compress_24(W.bool()), TypeError, "compress_24: weight must be float16, .* got bool"),
    (lambda: decompress_24(V, None), TypeError, "decompress_24: metadata must be a torch.Tensor, got NoneType"),
    (lambda: decompress_24(V.double(), M), TypeError, "decompress_24: values must be float16, .* got float64"),
    (lambda: decompress_24(V, M.int()), TypeError, "decompress_24: metadata must be uint8, got int32"),
    (lambda: decompress_24(V[:, :63], M), ValueError, r"values must have a multiple of 32 columns, got \[3, 63\]"),
    (lambda: decompress_24(V, M[:, :15]), ValueError, r"metadata must have shape \[3, 16\] for 64 columns of values"),
    (lambda: decompress_24(V, M[:2]), ValueError, r"metadata must have shape \[N, bytes\] with N=3, got \[2, 16\]"),
    (lambda: decompress_24(V, M, in_features=64), ValueError, "in_features must be more than 64 and at most 128, got"),
    (lambda: decompress_24(V, M, in_features=129), ValueError, "in_features must be more than 64 and at most 128, got"),
    (lambda: decompress_24(V, M, in_features=-1), ValueError, "in_features must be more than 64 and at most 128, got"),
    (lambda: decompress_24(V, M, in_features=99.0), TypeError, "in_features must be an int, got float"),
    (lambda: decompress_24(V, M, in_features=True), TypeError, "in_features must be an int, got bool"),
]


@pytest.mark.parametrize("call, error, message", REJECTS)
def test_rejects(call, error, message):
    assert_rejected(call, error, message)


@EVERY_IMPLEMENTATION
def test_what_the_values_say_is_refused(implementation):
    """The first of several, in any layout."""
    weight = torch.zeros(5, 40)
    weight[2, 12:15], weight[3, 4:8] = 1.0, 1.0
    scores = torch.ones(5, 40)
    scores[3, 17], scores[4, 0] = NAN, NAN
    with using(implementation):
        for change in (lambda w: w, lambda w: w.T.contiguous().T):
            with pytest.raises(ValueError, match=r"compress_24: .* got 3 in row 2, group 3 \(columns 12 to 15\)"):
                compress_24(change(weight))
            with pytest.raises(ValueError, match="prune_24: scores must be numbers, got NaN in row 3, column 17"):
                prune_24(change(weight), scores=change(scores))


def test_places_out_of_order_are_refused_at_level_2_and_stay_in_their_group_at_level_1():
    broken = M.clone()
    broken[1, 3], broken[2, 0] = 0x84, 0x00
    ones = torch.ones_like(V)
    dense = decompress_24(ones, broken)
    wanted = torch.ones_like(ones).view(3, 32, 2).sum(-1)
    found = dense.view(3, 32, 4).sum(-1)
    assert torch.equal(found[0], wanted[0]) and found[2, 0] == 1.0
    everything = torch.arange(256, dtype=torch.uint8).view(16, 16)
    assert decompress_24(torch.ones(16, 64), everything).isfinite().all()
    with env.override("FUSEDOPS_VALIDATE", "2"):
        decompress_24(V, M)
        with pytest.raises(ValueError, match="decompress_24: metadata must .* got 0 and 0 in row 2, group 0"):
            decompress_24(V, broken)


# ---- torch


def test_torch():
    weight = make_tensor((3, 70), torch.float32, seed=0, layout="padded")
    pruned = prune_24(weight)
    values, metadata = compress_24(pruned)
    opcheck("prune_24", weight, None)
    opcheck("prune_24", weight, weight.T.contiguous().T)
    opcheck("is_24", weight)
    opcheck("compress_24", pruned)
    opcheck("decompress_24", values, metadata, 70)
    for name, args in (("prune_24", (weight.T, None)), ("is_24", (weight,)), ("compress_24", (pruned,))):
        assert_fake_like_real(name, *args)
    assert_fake_like_real("decompress_24", values, metadata, 70)


def test_torch_compile():
    """What cannot be stored is refused inside a compiled function too."""

    def function(weight):
        values, metadata = compress_24(prune_24(weight))
        return decompress_24(values, metadata, in_features=weight.shape[1]) + 1

    assert_compiles(function, (torch.randn(3, 70),), (torch.randn(5, 64),))
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: compress_24(w), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="got 4 in row 0, group 0"):
        compiled(torch.ones(2, 8))


def test_no_derivative():
    with pytest.raises(NotImplementedError, match="prune_24: the result must not be differentiated"):
        prune_24(torch.ones(2, 8, requires_grad=True)).sum().backward()


def test_without_kernels_there_is_no_fused_path_to_leave():
    """On a GPU they run by torch and say nothing; asking for kernels by name is no error either."""
    for name in ("prune_24", "is_24", "compress_24", "decompress_24"):
        assert name not in fusedops.OPERATORS
        selector = operators()[name]._selector
        assert not selector.leaves_fused_path("torch", SimpleNamespace(device=torch.device("cuda:0")))
    fused = operators()["rms_norm"]._selector
    assert fused.leaves_fused_path("torch", SimpleNamespace(device=torch.device("cuda:0")))
    for backend in ("triton", "cuda", "emulate"):
        with env.override("FUSEDOPS_BACKEND", backend), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_24(prune_24(torch.ones(2, 8)))
    assert counters() == {("prune_24", "torch"): 3, ("is_24", "torch"): 3}


def test_cost_counts_every_byte():
    weight = torch.zeros(3, 70, dtype=torch.bfloat16)
    compressed = 3 * (64 * 2 + 16)
    for name, args, moved in (
        ("prune_24", (weight,), 2 * 420),
        ("is_24", (weight,), 420),
        ("compress_24", (weight,), 420 + compressed),
        ("decompress_24", compress_24(weight), 3 * 128 * 2 + compressed),
    ):
        told = fusedops.explain(name, *args)
        assert told.bytes == moved and told.operations > 0 and told.backend == "torch"

"""fusedops.nn.functional.scaled_dot_product_attention stands in for torch's."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
import fusedops.nn.functional as F
from fusedops import counters
from fusedops.testing import make_tensor, strategies
from tests.ops.common import assert_compiles, gradients, using

torchs = torch.nn.functional.scaled_dot_product_attention
ours = F.scaled_dot_product_attention


def operands(*leading, num_queries=5, num_keys=7, head_dim=16, value_dim=None, kv=None, dtype=torch.float32, seed=0):
    """query, key and value with the leading dimensions in front of positions."""
    kv = leading if kv is None else kv
    shapes = (*leading, num_queries, head_dim), (*kv, num_keys, head_dim), (*kv, num_keys, value_dim or head_dim)
    return tuple(make_tensor(shape, dtype, seed=seed + i) for i, shape in enumerate(shapes))


def assert_equals_torch(query, key, value, attn_mask=None, *, ran="attention", **options):
    """Values and gradients of torch's function, and our operator is what ran (None: torch's own)."""
    args, mask = [query, key, value], attn_mask
    grad = make_tensor(torchs(*args, mask, **options).shape, args[0].dtype, seed=9)
    before = counters()
    found = ours(*args, mask, **options)
    assert sum(counters().values()) - sum(before.values()) == (ran is not None), counters()
    epsilon = torch.finfo(args[0].dtype).eps
    tolerance = {"rtol": 4 * epsilon, "atol": 4 * epsilon} if epsilon > 1e-4 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, torchs(*args, mask, **options), **tolerance)
    pairs = zip(*(gradients(lambda *t, f=f: f(*t, mask, **options), args, grad) for f in (ours, torchs)))
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_signature_is_torchs():
    described = [[(p.name, p.default) for p in inspect.signature(ours).parameters.values()]]
    text = torchs.__doc__.partition("scaled_dot_product_attention(")[2].partition(")")[0]
    assert [name for name, _ in described[0]] == [part.split("=")[0].strip() for part in text.split(",")]
    assert [default for _, default in described[0][3:]] == [None, 0.0, False, None, False]


@pytest.mark.parametrize("num_queries, num_keys", [(5, 5), (5, 7), (7, 5), (1, 6), (6, 1), (70, 33), (33, 70)])
@pytest.mark.parametrize("leading", [(2, 3), (4,), (), (2, 1, 3), (2, 2, 1, 3)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_is_aligned_as_torch_aligns_it(leading, num_queries, num_keys, is_causal):
    """The first query with the first key, whatever the lengths, for any number of leading dimensions."""
    args = operands(*leading, num_queries=num_queries, num_keys=num_keys)
    assert_equals_torch(*args, is_causal=is_causal)


@pytest.mark.parametrize("dtype, num_queries, group, torchs_own", [
    (torch.float32, 5, 1, True), (torch.float32, 5, 2, True), (torch.float32, 1, 1, True), (torch.float32, 1, 2, False),
    (torch.float16, 1, 1, True), (torch.float16, 1, 2, False), (torch.float16, 5, 1, False),
    (torch.bfloat16, 1, 1, False),
])  # fmt: skip
def test_torchs_own_runs_where_it_is_as_exact_and_as_fast(monkeypatch, dtype, num_queries, group, torchs_own):
    """On the CPU without mask and gradients. It counts as our composition; one that is forced is not left."""
    args = operands(2, 4, num_queries=num_queries, kv=(2, 4 // group), dtype=dtype)
    ran = []

    def seen(*args, **options):
        ran.append("ours")
        return fusedops.attention(*args, **options)

    monkeypatch.setattr(F, "_attention", seen)
    with torch.no_grad():
        before = counters().get(("attention", "torch"), 0)
        found = ours(*args, enable_gqa=group > 1)
        assert counters()["attention", "torch"] == before + 1
    assert ran == ([] if torchs_own else ["ours"])
    if torchs_own:
        assert torch.equal(found, torchs(*args, enable_gqa=group > 1)) and found.is_contiguous()
    ran.clear()
    with torch.no_grad(), using("reference"):
        ours(*args, enable_gqa=group > 1)
    assert ran == ["ours"]


@st.composite
def calls(draw):
    """A call that torch takes: layouts, grouped heads, masks of any broadcast shape."""
    leading = draw(st.sampled_from([(2, 4), (4,), (2, 1, 4), (1, 2)]))
    group = draw(st.sampled_from([1, 2]))
    kv = (*leading[:-1], leading[-1] // group)
    num_queries, num_keys, head_dim = (draw(st.sampled_from(sizes)) for sizes in ((1, 5, 17), (1, 7, 33), (8, 40)))
    seed = draw(strategies.seeds())
    args = [
        make_tensor(shape, torch.float32, seed=seed + i, layout=draw(strategies.layouts(len(shape))))
        for i, shape in enumerate(((*leading, num_queries, head_dim), *[(*kv, num_keys, head_dim)] * 2))
    ]
    options = {"enable_gqa": True} if group > 1 else {}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.1, 1.0]))
    kind = draw(st.sampled_from(["none", "causal", "bool", "additive"]))
    if kind == "causal":
        options["is_causal"] = True
    if kind in ("none", "causal"):
        return args, None, options
    shape = [draw(st.sampled_from([1, size])) for size in (*leading, num_queries, num_keys)][draw(st.integers(0, 2)) :]
    mask = make_tensor(shape, torch.float32, seed=seed + 3)
    return args, mask > -0.5 if kind == "bool" else mask, options


@given(call=calls())
def test_equals_torch(call):
    args, mask, options = call
    partly = mask is not None and mask.dim() == 5 and args[0].shape[:2] != mask.shape[:2] != (1, 1)
    assert_equals_torch(*args, mask, ran=None if partly else "attention", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    args = operands(2, 4, num_queries=40, num_keys=40, dtype=dtype)
    assert_equals_torch(*args, is_causal=True)
    for mask_dtype in (dtype, torch.float32):
        assert_equals_torch(*args, torch.zeros(40, 40, dtype=mask_dtype), scale=0.2)


def test_rows_that_see_nothing_are_zero():
    args = operands(1, 2)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out = ours(*args, mask)
    assert not out[:, :, 2].any()
    torch.testing.assert_close(out, torchs(*args, mask))


NOT_COVERED = {
    "float64": (operands(2, 3, dtype=torch.float64), {}),
    "head dim": (operands(2, 3, head_dim=12), {}),
    "value dim": (operands(2, 3, value_dim=20), {}),
    "broadcast batch": (operands(2, 3, kv=(1, 3)), {}),
    "broadcast heads": (operands(2, 3, kv=(2, 1)), {}),
    "causal mask": (operands(2, 3), {"is_causal": True, "attn_mask": torch.eye(5, 7)}),
}


@pytest.mark.parametrize("name", list(NOT_COVERED))
def test_what_we_do_not_cover_is_torchs(name):
    args, options = NOT_COVERED[name]
    assert_equals_torch(*args, ran=None, **options)


def test_dropout_and_masks_with_gradients_are_torchs():
    args = operands(2, 3)
    torch.manual_seed(0)
    dropped = ours(*args, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(dropped, torchs(*args, dropout_p=0.5))
    mask = torch.zeros(5, 7, requires_grad=True)
    (found,) = torch.autograd.grad(ours(*args, mask).square().sum(), mask)
    (wanted,) = torch.autograd.grad(torchs(*args, mask).square().sum(), mask)
    torch.testing.assert_close(found, wanted)
    assert not counters()
    with torch.no_grad():
        ours(*args, mask)
    assert counters() == {("attention", "torch"): 1}


@pytest.mark.parametrize(
    "args, options",
    [
        (operands(2, 3)[:2] + (None,), {}),
        (operands(2, 3, kv=(2, 2)), {}),
        ((*operands(2, 3), torch.zeros(5, 6)), {}),
        ((*operands(2, 3), torch.zeros(5, 7).int()), {}),
        ((torch.zeros(5), torch.zeros(5), torch.zeros(5)), {}),
        (operands(2, 3, kv=(2, 2)), {"enable_gqa": True}),
        (operands(2, 3)[:2] + operands(2, 3, dtype=torch.float16)[2:], {}),
    ],
)
def test_a_wrong_call_gets_torchs_own_error(args, options):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        torchs(*args, **options)
    with pytest.raises(type(theirs.value)) as mine:
        ours(*args, **options)
    assert str(mine.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_no_copy_of_operands_or_mask(monkeypatch):
    """Views reach the operator as they are: heads outside or inside, masks unexpanded."""
    seen = []
    monkeypatch.setattr(F, "_attention", lambda *args, **kw: seen.append((args, kw)) or args[0])
    query = torch.randn(2, 3, 5, 16)
    packed = torch.randn(2, 5, 3, 16).transpose(1, 2)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    ours(query, packed, packed, mask)
    (q, k, v), options = seen[0]
    assert q.data_ptr() == query.data_ptr() and k.data_ptr() == v.data_ptr() == packed.data_ptr()
    assert options["mask"] is mask
    ours(torch.randn(2, 3, 4, 16), packed, packed, is_causal=True)
    assert seen[1][0][1].shape[1] == 4 and seen[1][0][1].data_ptr() == packed.data_ptr() and seen[1][1]["mask"] is None


def test_autocast_chooses_the_dtype():
    args = operands(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = ours(*args, torch.zeros(5, 7)), torchs(*args, torch.zeros(5, 7))
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)


def test_compiles_and_runs_on_meta():
    def function(query, key, value, mask):
        return ours(query, key, value, mask) + ours(query, key, value, is_causal=True)

    assert_compiles(
        function, (*operands(2, 3), torch.ones(5, 7) > 0), (*operands(2, 3, num_queries=9), torch.ones(9, 7) > 0)
    )
    shapes = [t.to("meta") for t in operands(2, 3, value_dim=24)]
    assert ours(*shapes, torch.ones(5, 7, device="meta") > 0).shape == (2, 3, 5, 24)

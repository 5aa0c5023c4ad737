"""Environment, shape checks, memory checks, row layouts, device limits, explain."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedops
from fusedops._core import checks, device, env, rows

# ---- environment


def test_a_wrong_value_is_named(monkeypatch):
    monkeypatch.setenv("FUSEDOPS_BACKEND", "gpu")
    env.refresh()
    with pytest.raises(ValueError, match="FUSEDOPS_BACKEND must be one of auto, .*, got 'gpu'"):
        fusedops.rms_norm(torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="FUSEDOPS_FALLBACK must be one of .*, got 'loud'"), env.override(
        "FUSEDOPS_FALLBACK", "loud"
    ):
        pass


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDOPS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    env.refresh()
    assert env.cache_dir() == tmp_path / "fusedops"
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", "~/elsewhere")
    env.refresh()
    assert env.cache_dir().name == "elsewhere" and env.cache_dir().is_absolute()


def test_override_ends_with_its_block():
    before = env.backend()
    with pytest.raises(KeyError), env.override("FUSEDOPS_BACKEND", "reference"):
        assert env.backend() == "reference"
        raise KeyError
    assert env.backend() == before


# ---- shapes


def test_bind_shapes_returns_the_sizes():
    q, k = torch.empty(2, 5, 4, 8), torch.empty(2, 7, 1, 8)
    sizes = checks.bind_shapes("op", q=(q, "B Sq H D"), k=(k, "B Sk Hk D"), mask=(None, "B Sq Sk?"))
    assert sizes == {"B": 2, "Sq": 5, "H": 4, "D": 8, "Sk": 7, "Hk": 1}
    sizes = checks.bind_shapes("op", x=(torch.empty(3, 2, 8), "... N"), y=(torch.empty(3, 2, 4), "... 4"))
    assert sizes == {"...": (3, 2), "N": 8}


@pytest.mark.parametrize(
    "tensors, error, message",
    [
        ({"a": ([1], "N")}, TypeError, "op: a must be a torch.Tensor, got list"),
        ({"a": (None, "N")}, TypeError, "op: a must be a torch.Tensor, got NoneType"),
        ({"a": (torch.empty(2, 3), "N")}, ValueError, r"op: a must have shape \[N\], got \[2, 3\]"),
        ({"a": (torch.empty(2, 3), "N N")}, ValueError, r"a must have shape \[N, N\], got \[2, 3\]"),
        ({"a": (torch.empty(3), "4")}, ValueError, r"a must have shape \[4\], got \[3\]"),
        (
            {"k": (torch.empty(2, 100, 2, 8), "B Sk Hk D"), "v": (torch.empty(2, 99, 2, 8), "B Sk Hk Dv")},
            ValueError,
            r"v must have shape \[B, Sk, Hk, Dv\] with B=2, Sk=100, Hk=2, got \[2, 99, 2, 8\]",
        ),
        (
            {"a": (torch.empty(2, 3, 4), "... N"), "b": (torch.empty(3, 2, 4), "... N")},
            ValueError,
            r"b must have shape \[..., N\] with ...=\[2, 3\], N=4, got \[3, 2, 4\]",
        ),
        (
            {"a": (torch.empty(2), "N"), "b": (torch.empty(2, device="meta"), "N")},
            ValueError,
            "b must be on cpu, got meta",
        ),
    ],
)
def test_bind_shapes_rejects(tensors, error, message):
    with pytest.raises(error, match=message):
        checks.bind_shapes("op", **tensors)


# ---- memory

STRIDES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=3)


def addresses(tensor):
    """Every element's position in the storage, by brute force."""
    offsets = torch.tensor([tensor.storage_offset()])
    for size, stride in zip(tensor.shape, tensor.stride()):
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    return offsets.tolist()


def view(dims, offset):
    shape, strides = zip(*dims)
    return torch.zeros(200).as_strided(shape, strides, offset)


@given(dims=STRIDES)
def test_check_writable_never_lets_two_elements_share_an_address(dims):
    tensor = view(dims, 0)
    found = addresses(tensor)
    if len(set(found)) < len(found):
        with pytest.raises(ValueError, match="op: x must not overlap itself"):
            checks.check_writable("op", x=tensor)
    elif tensor.is_contiguous():
        checks.check_writable("op", x=tensor)


@given(dims=STRIDES, other=STRIDES, offset=st.integers(0, 60), equal_strides=st.booleans())
def test_overlaps_never_misses_a_shared_address(dims, other, offset, equal_strides):
    buffer = torch.zeros(400)
    other = dims if equal_strides else other
    a = buffer.as_strided([n for n, _ in dims], [s for _, s in dims], 100)
    b = buffer.as_strided([n for n, _ in other], [s for _, s in other], 100 + offset - 30)
    if set(addresses(a)) & set(addresses(b)):
        assert checks.overlaps(a, b) and checks.overlaps(b, a)


def test_overlaps_knows_halves_of_packed_rows_and_separate_tensors():
    packed = torch.zeros(3, 16)
    gate, up = packed.chunk(2, -1)
    assert not checks.overlaps(gate, up) and checks.overlaps(packed[:, :9], up)
    assert not checks.overlaps(gate, torch.zeros(3, 8)) and not checks.overlaps(packed[:0], packed)
    assert checks.same_memory(gate, packed[:, :8]) and not checks.same_memory(gate, up)


# ---- rows


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    order=st.permutations(range(3)),
    keep=st.integers(1, 3),
)
def test_collapse_finds_every_row(shape, order, keep):
    """The layout of two tensors, one permuted and sliced, gives the addresses of all rows in order."""
    shape = (*shape, 5)
    plain = torch.zeros(shape)
    places = [p for p in order if p < len(shape) - 1]
    inverse = sorted(range(len(places)), key=places.__getitem__)
    permuted = torch.zeros([shape[p] for p in places] + [5 + keep]).permute(*inverse, len(places))[..., :5]
    assert permuted.shape == plain.shape
    layout = rows.collapse(plain, permuted)
    if layout is None:
        assert len(shape) == 4
        return
    count, inner, strides = layout
    for index, tensor in enumerate((plain, permuted)):
        outer_stride, inner_stride = strides[2 * index : 2 * index + 2]
        found = [(r // inner) * outer_stride + (r % inner) * inner_stride for r in range(count)]
        assert found == addresses(tensor[..., 0])


def test_rows_that_need_copies_are_copied():
    x = torch.randn(2, 3, 4, 5).permute(2, 1, 0, 3)
    assert rows.collapse(x, torch.zeros(4, 3, 2, 5)) is None
    with env.override("FUSEDOPS_BACKEND", "triton"):
        out = fusedops.rms_norm(x, torch.ones(5))
        kept = x.clone()
        fusedops.add_rms_norm_(kept, x.contiguous(), torch.ones(5))
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (5,), eps=1e-6))
    torch.testing.assert_close(kept, torch.nn.functional.rms_norm(2 * x, (5,), eps=1e-6))


@pytest.mark.parametrize("n", [1, 2, 3, 64, 128, 576, 1024, 5120, 16384, 16385, 65536])
def test_row_configurations_fit_any_device(n):
    """No block is larger than registers hold or has more threads than CUDA allows; short rows stand in one block.

    B57, shared memory beyond a target's, is judged from the machine code in test_compile.py.
    """
    tile = rows.default(n)
    assert tile.block_m * tile.block_n <= rows.MAX_BLOCK and tile.num_warps in (1, 2, 4, 8, 16)
    assert tile.block_m == 1 or tile.block_n >= n
    assert 32 * tile.num_warps <= 1024


# ---- device and explain


def test_targets_are_ordered_facts():
    for arch, limits in device.TARGETS.items():
        assert limits.arch == arch and limits.capability == int("".join(filter(str.isdigit, arch)))
    shared = {arch: limits.shared_memory // 1024 for arch, limits in device.TARGETS.items()}
    assert (shared["sm_75"], shared["sm_80"], shared["sm_89"], shared["sm_90a"]) == (64, 163, 99, 227)


def test_explain_tells_the_truth_about_the_call():
    x, w = torch.ones(4, 8), torch.ones(8)
    here = fusedops.explain("rms_norm", x, w)
    assert (here.backend, here.rejected, here.bound) == ("torch", (), None)
    assert here.bytes == 2 * 4 * 8 * 4 + 8 * 4
    there = fusedops.explain("rms_norm", x.to("meta"), w.to("meta"), target="sm_90a")
    assert there.backend == "triton" and "RowConfig" in there.config and "H100" in there.bound
    with env.override("FUSEDOPS_BACKEND", "reference"):
        assert fusedops.explain("rms_norm", x, w).backend == "reference"
    assert json.loads(json.dumps(here.as_dict()))["op"] == "rms_norm" and "runs on" in str(here)
    assert fusedops.counters() == {}


@pytest.mark.parametrize("name", fusedops.OPERATORS)
def test_explain_knows_every_operator(name):
    args, kwargs = fusedops._core.register.operators()[name].example((2, 3, 4, 8), torch.bfloat16, "meta")
    there = fusedops.explain(name, *args, **kwargs, target="sm_80")
    assert there.backend == "triton" and there.bytes > 0 and there.operations > 0 and there.config


def test_explain_rejects():
    x, w = torch.ones(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match="explain: op must be one of add_layer_norm, .*, got 'softmax'"):
        fusedops.explain("softmax", x)
    with pytest.raises(ValueError, match="explain: target must be one of sm_75, .*, got 'sm_1'"):
        fusedops.explain("rms_norm", x, w, target="sm_1")
    with pytest.raises(ValueError, match="rms_norm: weight must have shape"):
        fusedops.explain("rms_norm", x, w[:3])

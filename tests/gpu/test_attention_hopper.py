"""The Hopper kernel on its GPU. Small calls would split their keys and run the portable kernel; here they may not."""

import pytest
import torch

from fusedops import attention, attention_varlen
from fusedops.ops.attention import _triton as kernels
from tests.gpu.common import DRY_RUN, randn
from tests.gpu.test_attention import BF16, FP8, FP16, OPTIONS, check, packed, qkv, with_tensors
from tests.ops.common import using

HOPPER = not DRY_RUN and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]

WINDOWS = ({}, {"causal": True}, {"causal": True, "window_size": (100, 0)}, {"window_size": (70, 33)})
LENGTHS = [(64, 64), (128, 128), (129, 127), (192, 385), (385, 515), (700, 300), (65, 1), (64, 5000), (1000, 1000)]


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Calls of the Hopper kernel; every test has one."""
    seen = []
    launch = kernels.hopper_launch.launch

    def counting(*args):
        seen.append(args[0])
        return launch(*args)

    monkeypatch.setattr(kernels, "num_splits", lambda *args: 1)
    monkeypatch.setattr(kernels.hopper_launch, "launch", counting)
    yield seen
    assert seen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "dims", [(d, d) for d in (8, 40, 64, 72, 80, 96, 104, 128, 192, 256)] + [(192, 128), (64, 256), (256, 64)], ids=str
)
def test_head_sizes(dims, dtype, causal):
    check(attention, *qkv(2, (385, 515), (4, 2), dims, dtype), causal=causal)


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_lengths(lengths, options, dim):
    check(attention, *qkv(2, lengths, (4, 2), (dim, dim)), **options)


@pytest.mark.parametrize("heads", [(1, 1), (12, 4), (7, 7), (40, 1)], ids=str)
def test_more_tiles_than_blocks(heads):
    """Some blocks are served more than once, and in the last round not all of them."""
    check(attention, *qkv(3, (700, 700), heads, (64, 64)), causal=True)


NAMES = ("scale", "window of one", "softcap", "sinks", "sinks in a window")


@pytest.mark.parametrize("name, dim", [(n, d) for n in NAMES for d in (64, 128, 256) if d < 256 or "window" not in n])
def test_options(name, dim):
    check(attention, *qkv(2, (300, 333), (8, 2), (dim, dim)), **with_tensors(OPTIONS[name], name))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("scales", [(1, 1, 1), (2, 2, 2), (2, None, 1), (None, 1, None)], ids=str)
def test_float8(dim, scales):
    tensors = qkv(2, (385, 515), (4, 2), (dim, dim), FP8)
    rows = {name: count for name, count in zip("qkv", scales, strict=True) if count}
    options = {
        f"{name}_scale": randn(count, 4 if name == "q" else 2, dtype=torch.float32).abs() + 0.5
        for name, count in rows.items()
    }
    check(attention, *tensors, causal=True, **options)


PACKED = [
    ([0, 5, 130, 0, 1, 257], [3, 5, 64, 7, 0, 300]),
    ([128, 64, 192], [128, 64, 192]),
    ([300], [300]),
    ([1] * 70 + [64], [3] * 71),
]


@pytest.mark.parametrize("options", [*WINDOWS, {"causal": True, "softcap": 9.0, "sinks": (8,)}], ids=str)
@pytest.mark.parametrize("lengths", PACKED, ids=["mixed", "whole tiles", "one", "many short"])
@pytest.mark.parametrize("dim", [64, 128])
def test_packed_sequences(lengths, options, dim):
    check(attention_varlen, *packed(lengths, dim), **with_tensors(options, "varlen"))


@pytest.mark.parametrize("dim", [64, 128])
def test_packed_sequences_do_not_see_each_other(dim):
    """A tile ends in the next sequence, whose NaN it must neither read as values nor overwrite."""
    lengths = PACKED[0]
    q, k, v, *rest = packed(lengths, dim)
    with using("triton"):
        clean = attention_varlen(q, k, v, *rest)
        k, v = k.clone(), v.clone()
        k[-lengths[1][-1] :], v[-lengths[1][-1] :] = float("nan"), float("nan")
        spoiled = attention_varlen(q, k, v, *rest)
    others = q.shape[0] - lengths[0][-1]
    assert torch.equal(clean[:others], spoiled[:others]) and spoiled[others:].isnan().all()


def test_nan_in_keys_and_values_left_of_every_window():
    q, k, v = (tensor.contiguous() for tensor in qkv(2, (100, 700), (8, 2), (128, 128)))
    options = {"causal": True, "window_size": (50, 0)}
    with using("triton"):
        clean = attention(q, k, v, **options)
        k[:, :550], v[:, :550] = float("nan"), float("nan")
        spoiled = attention(q, k, v, **options)
    assert torch.equal(clean, spoiled) and clean.isfinite().all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_hundred_runs_are_equal(dim):
    q, k, v = qkv(2, (1500, 1500), (16, 4), (dim, dim))
    with using("triton"):
        first = attention(q, k, v, causal=True)
        assert all(torch.equal(first, attention(q, k, v, causal=True)) for _ in range(100))

"""The Hopper kernel: on its GPU, and without any GPU emulated, on fewer and smaller calls.

Small calls would split their keys and run the portable kernel; here they may not.
"""

import pytest
import torch

from fusedops import attention, attention_varlen
from fusedops.ops.attention import _triton as kernels
from fusedops.testing.ptx.launches import diverted
from tests.gpu import test_attention as portable
from tests.gpu.common import DEVICE, randn
from tests.gpu.test_attention import BF16, FP8, FP16, OPTIONS, packed, qkv, with_tensors
from tests.ops.common import using

EMULATED = DEVICE == "cpu"
BY = "emulate-sm_90a" if EMULATED else "triton"
HOPPER = not EMULATED and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.emulated if EMULATED else pytest.mark.gpu,
    pytest.mark.skipif(not (EMULATED or HOPPER), reason="needs a GPU of compute capability 9.0"),
]


def sized(real, emulated):
    """What to try on a GPU, or emulated."""
    return emulated if EMULATED else real


def check(function, *args, **options):
    return portable.check(function, *args, by=BY, **options)


@pytest.fixture
def every_schedule():
    """Emulated, all orders of events that the emulator knows: warpgroups share the clearing of unseen values."""
    with diverted(schedules="all"):
        yield


WINDOWS = ({}, {"causal": True}, {"causal": True, "window_size": (100, 0)}, {"window_size": (70, 33)})
LENGTHS = sized(
    [(64, 64), (128, 128), (129, 127), (192, 385), (385, 515), (700, 300), (65, 1), (64, 5000), (1000, 1000)],
    [(64, 64), (129, 127), (65, 1), (64, 600)],
)
BATCH = sized(2, 1)


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
    "dims",
    [(d, d) for d in sized((8, 40, 64, 72, 80, 96, 104, 128, 192, 256), (64, 72, 256))]
    + sized([(192, 128), (64, 256), (256, 64)], [(192, 128)]),
    ids=str,
)
def test_head_sizes(dims, dtype, causal):
    check(attention, *qkv(BATCH, sized((385, 515), (100, 190)), sized((4, 2), (2, 1)), dims, dtype), causal=causal)


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dim", sized([64, 128], [128]))
def test_lengths(lengths, options, dim):
    check(attention, *qkv(BATCH, lengths, sized((4, 2), (2, 1)), (dim, dim)), **options)


@pytest.mark.parametrize("heads", sized([(1, 1), (12, 4), (7, 7), (40, 1)], [(3, 1), (3, 3)]), ids=str)
def test_more_tiles_than_blocks(heads):
    """Some blocks are served more than once, and in the last round not all of them."""
    check(attention, *qkv(sized(3, 2), sized((700, 700), (100, 130)), heads, (64, 64)), causal=True)


DIMS = sized((64, 128, 256), (128,))
NAMES = ("scale", "window of one", "softcap", "sinks", "sinks in a window")


@pytest.mark.parametrize("name, dim", [(n, d) for n in NAMES for d in DIMS if d < 256 or "window" not in n])
def test_options(name, dim):
    lengths = sized((300, 333), (70, 150))
    check(attention, *qkv(BATCH, lengths, (8, 2), (dim, dim)), **with_tensors(OPTIONS[name], name))


@pytest.mark.parametrize("dim", sized([64, 128, 256], [64, 128]))
@pytest.mark.parametrize("scales", [(1, 1, 1), (2, 2, 2), (2, None, 1), (None, 1, None)], ids=str)
def test_float8(dim, scales):
    tensors = qkv(2, sized((385, 515), (70, 150)), (4, 2), (dim, dim), FP8)
    rows = {name: count for name, count in zip("qkv", scales, strict=True) if count}
    options = {
        f"{name}_scale": randn(count, 4 if name == "q" else 2, dtype=torch.float32).abs() + 0.5
        for name, count in rows.items()
    }
    check(attention, *tensors, causal=True, **options)


PACKED = sized(
    [
        ([0, 5, 130, 0, 1, 257], [3, 5, 64, 7, 0, 300]),
        ([128, 64, 192], [128, 64, 192]),
        ([300], [300]),
        ([1] * 70 + [64], [3] * 71),
    ],
    [
        ([0, 5, 100, 0, 1, 70], [3, 5, 64, 7, 0, 140]),
        ([128, 64], [128, 64]),
        ([70], [70]),
        ([1] * 4 + [64], [3] * 5),
    ],
)


@pytest.mark.parametrize("options", [*WINDOWS, {"causal": True, "softcap": 9.0, "sinks": (8,)}], ids=str)
@pytest.mark.parametrize("lengths", PACKED, ids=["mixed", "whole tiles", "one", "many short"])
@pytest.mark.parametrize("dim", sized([64, 128], [64]))
def test_packed_sequences(lengths, options, dim):
    check(attention_varlen, *packed(lengths, dim), **with_tensors(options, "varlen"))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.usefixtures("every_schedule")
def test_packed_sequences_do_not_see_each_other(dim):
    """A tile ends in the next sequence, whose NaN it must neither read as values nor overwrite."""
    lengths = PACKED[0]
    q, k, v, *rest = packed(lengths, dim)
    with using(BY):
        clean = attention_varlen(q, k, v, *rest)
        k, v = k.clone(), v.clone()
        k[-lengths[1][-1] :], v[-lengths[1][-1] :] = float("nan"), float("nan")
        spoiled = attention_varlen(q, k, v, *rest)
    others = q.shape[0] - lengths[0][-1]
    assert torch.equal(clean[:others], spoiled[:others]) and spoiled[others:].isnan().all()


@pytest.mark.usefixtures("every_schedule")
def test_nan_in_keys_and_values_left_of_every_window():
    num_keys = sized(700, 300)
    q, k, v = (tensor.contiguous() for tensor in qkv(BATCH, (100, num_keys), (8, 2), (128, 128)))
    options = {"causal": True, "window_size": (50, 0)}
    unseen = slice(num_keys - 150)
    with using(BY):
        clean = attention(q, k, v, **options)
        k[:, unseen], v[:, unseen] = float("nan"), float("nan")
        spoiled = attention(q, k, v, **options)
    assert torch.equal(clean, spoiled) and clean.isfinite().all()


@pytest.mark.skipif(EMULATED, reason="needs a GPU: emulated runs are equal")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_hundred_runs_are_equal(dim):
    q, k, v = qkv(2, (1500, 1500), (16, 4), (dim, dim))
    with using(BY):
        first = attention(q, k, v, causal=True)
        assert all(torch.equal(first, attention(q, k, v, causal=True)) for _ in range(100))

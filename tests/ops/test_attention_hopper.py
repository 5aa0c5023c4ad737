"""The Hopper kernel without a Hopper GPU: which calls it takes, what it is handed, and its machine code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedops import explain
from fusedops._core.device import INTERPRETER, TARGETS
from fusedops.ops.attention._triton import hopper_launch
from fusedops.ops.attention._triton.hopper_launch import HopperConfig

H100 = TARGETS["sm_90a"]
ROOT = Path(__file__).resolve().parents[2]
FP8 = torch.float8_e4m3fn


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def chosen(q, k=None, v=None, target="sm_90a", **options):
    """Name of the configuration's class that a call would run with."""
    k = q if k is None else k
    return explain("attention", q, k, k if v is None else v, target=target, **options).config.partition("(")[0]


Q = meta(2, 4096, 8, 128)
SCALES = {"q_scale": meta(1, 8, dtype=torch.float32)}
PADDED = meta(2, 4096, 8, 132)[..., :128]  # strides of 264 bytes


@pytest.mark.parametrize(
    ("call", "config"),
    [
        ({"q": Q}, "HopperConfig"),
        ({"q": Q, "causal": True, "window_size": (512, 0), "softcap": 30.0}, "HopperConfig"),
        ({"q": Q, "sinks": meta(8)}, "HopperConfig"),
        ({"q": meta(2, 4096, 8, 80), "causal": True}, "HopperConfig"),
        ({"q": meta(2, 4096, 8, 256), "causal": True}, "HopperConfig"),
        ({"q": meta(2, 4096, 8, 192), "v": meta(2, 4096, 8, 128)}, "HopperConfig"),
        ({"q": Q.to(FP8), **SCALES}, "HopperConfig"),
        ({"q": Q.transpose(1, 2).contiguous().transpose(1, 2)}, "HopperConfig"),
        ({"q": Q, "target": "sm_80"}, "AttentionConfig"),
        ({"q": Q, "target": "sm_100a"}, "AttentionConfig"),
        ({"q": Q.float()}, "AttentionConfig"),
        ({"q": Q, "alibi_slopes": meta(8, dtype=torch.float32)}, "AttentionConfig"),
        ({"q": Q, "mask": meta(1, 1, 4096, 4096, dtype=torch.bool)}, "AttentionConfig"),
        ({"q": Q.to(FP8), "softcap": 30.0, **SCALES}, "AttentionConfig"),
        ({"q": meta(2, 4096, 8, 512)}, "AttentionConfig"),
        ({"q": meta(2, 4096, 8, 256), "causal": True, "window_size": (512, 0)}, "AttentionConfig"),
        ({"q": Q[:, :63], "k": Q}, "AttentionConfig"),
        ({"q": Q, "softmax_scale": -1.0}, "AttentionConfig"),
        ({"q": PADDED}, "AttentionConfig"),
        ({"q": Q, "k": Q[:, :, :1].expand(-1, -1, 2, -1)}, "AttentionConfig"),
        ({"q": meta(1, 128, 8, 128), "k": meta(1, 65536, 8, 128)}, "AttentionConfig"),  # few tiles: split keys
    ],
)
def test_which_calls_it_takes(call, config):
    assert chosen(**call) == config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"limits": INTERPRETER}, "sm_90a"),
        ({"limits": TARGETS["sm_89"]}, "sm_90a"),
        ({"q": Q.float()}, "16 or 8 bits"),
        ({"q": meta(2, 4096, 8, 264)}, "at most 256"),
        ({"q": meta(2, 4096, 8, 256), "left": True}, "no registers"),
        ({"q": meta(2, 4096, 8, 256), "varlen": True}, "no registers"),
        ({"max_q": 63}, "64 queries"),
        ({"scale": 0.0}, "positive softmax_scale"),
        ({"q": PADDED}, "multiples of 16 bytes"),
        ({"q": Q[:, :0]}, "no size"),
    ],
)
def test_reasons(change, reason):
    given = {"limits": H100, "q": Q, "varlen": False, "max_q": 4096, "left": False, "scale": 1.0, **change}
    options = [None] * 6 + [given["scale"], True, -1, -1, 0.0]
    q = given["q"]
    found = hopper_launch.rejection(given["limits"], q, q, q, given["varlen"], given["max_q"], given["left"], options)
    assert found is reason is None or reason in found


def test_misaligned_address():
    base = torch.zeros(4 * 64 * 64 + 8, dtype=torch.bfloat16)
    tensors = [base[offset : offset + 4 * 64 * 64].view(1, 64, 4, 64) for offset in (0, 8, 1)]
    assert [hopper_launch.mappable(tensor) for tensor in tensors] == [True, True, False]


def test_tensor_maps_have_no_stride_that_a_size_of_1_left_behind():
    tensor = torch.zeros(3, 64, 2, 64, dtype=torch.bfloat16)[:1].as_strided((1, 64, 2, 64), (3, 128, 64, 1))
    described = hopper_launch._tensor_map(tensor, 64, 64)
    assert described.shape == [1, 2, 64, 64]
    assert described.strides == [8, 64, 128, 1]
    assert described.block_shape == [1, 1, 64, 64]


@pytest.mark.parametrize("heads, group, kv_bytes", [(8, 4, 2**20), (8, 1, 2**23), (12, 2, 2**30), (7, 1, 1)])
def test_sections_are_equal_and_fit_the_cache(heads, group, kv_bytes):
    size = hopper_launch._section(heads, group, kv_bytes)
    assert heads * group % size == 0
    assert size % group == 0
    assert size == group or size // group * kv_bytes <= hopper_launch.SECTION_BYTES


def test_scales_left_out_are_ones():
    q, k = torch.zeros(2, 4, 8, 64), torch.zeros(2, 4, 2, 64)
    assert hopper_launch._scales(q, k, (None, None, None)) == (False, 0, (None, None, None))
    scaled, rows, tables = hopper_launch._scales(q, k, (None, torch.full((2, 2), 3.0), torch.full((2,), 5.0)))
    assert (scaled, rows) == (True, 1)
    assert [table.tolist() for table in tables] == [[[1.0] * 8] * 2, [[3.0] * 2] * 2, [[5.0] * 2] * 2]
    assert hopper_launch._scales(q, k, (torch.ones(1, 8), None, None))[1] == 0


def test_shared_memory_of_every_configuration():
    for head_dim in range(8, 257, 8):
        for head_dim_v in (head_dim, 64, 128, 256):
            for itemsize in (1, 2):
                tile = hopper_launch.default(head_dim, head_dim_v, itemsize, plain=True)
                assert isinstance(tile, HopperConfig)
                rows = 64 * tile.num_groups
                used = rows * tile.block_d * itemsize + (0 if tile.out_in_q else rows * tile.block_dv * 2)
                used += tile.num_stages * tile.block_n * (tile.block_d * itemsize + tile.block_dv * 2)
                assert used + 1024 <= H100.shared_memory, tile


LISTING = """
import sys, tempfile
from fusedops._core import cubin
from fusedops._core.device import TARGETS
from fusedops.ops.attention._triton import hopper_launch

number = int(sys.argv[1])
examples = list(hopper_launch.examples("bf16", TARGETS["sm_90a"]))
compiled = cubin.compile_example(examples[number], "sm_90a")
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    print(cubin._run_tool("nvdisasm", "-c", file.name))
"""


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    """Machine code of a plain call in bfloat16 and in float8, compiled in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    kinds = [example.types["q_desc"] for example in hopper_launch.examples("bf16", H100)]
    wanted = {"bf16": "bf16[1,1,64,128]", "fp8": "fp8e4nv[1,1,64,128]"}
    numbers = {name: next(i for i, kind in enumerate(kinds) if text in kind) for name, text in wanted.items()}
    command = [sys.executable, "-c", LISTING]
    return {
        name: subprocess.run(
            [*command, str(number)], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name, number in numbers.items()
    }


@pytest.mark.compile
@pytest.mark.parametrize("name, products", [("bf16", {"HGMMA"}), ("fp8", {"HGMMA", "QGMMA"})])
def test_machine_code(listings, name, products):
    opcodes = set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w+)", listings[name], re.MULTILINE))
    assert opcodes & {"HGMMA", "QGMMA", "HMMA", "IMMA"} == products
    assert {"UTMALDG", "UTMASTG", "USETMAXREG"} <= opcodes
    assert not opcodes & {"STL", "LDL"}


@pytest.mark.compile
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_softmax_runs_beside_the_value_product(listings, name):
    """The exponentials of a key tile stand between the wait for its scores and the wait for the product before.

    Without the wait for the next keys between them, ptxas puts all of them behind both: right, but nothing overlaps.
    """
    marks = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([01])|(MUFU\.EX2)", listings[name])
    counts, counting = [], None
    for wait, exponential in marks:
        if exponential and counting is not None:
            counting += 1
        elif wait == "1":
            counting = 0
        elif wait == "0" and counting is not None:
            counts.append(counting)
            counting = None
    assert len(counts) == 2, "one loop in each warpgroup"
    assert min(counts) >= 64

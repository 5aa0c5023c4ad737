"""benchmarks/_goals.py: every goal is judged, by rows as the benchmarks name them, and can be met and missed."""

import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedops

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
ON_DEVICE, EAGER = "device time under a CUDA graph", "wall time of eager calls"


@pytest.fixture(scope="module")
def goals():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("_goals")


def loaded(name):
    """A benchmark as a module that nobody else gets."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_cases(goals):
    """Script -> its cases on a GPU, all of them; tensors have shapes and no data."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(importlib.import_module("_common"), "peer", lambda *names: mock.MagicMock())  # all are there
        for name in SCRIPTS:
            module = loaded(name)
            if hasattr(module, "flex"):
                module.flex = mock.MagicMock()
            if hasattr(module, "alike"):  # it computes with numbers
                module.alike = lambda rows, n, device, dtype: torch.empty(rows, n, device=device)
            found[name] = list(module.cases("cuda", False))
    return found


def row(op, shape, dtype="bfloat16", seconds=1.0, timed=ON_DEVICE, **peers):
    return {
        "op": op, "shape": shape, "dtype": dtype, "timed": timed, "seconds": seconds, "peers": peers, "bytes": 2**29,
        "share_of_copy_bandwidth": 0.99, "share_of_matmul_rate": 0.9, "copy_bandwidth": 1e12,
    }  # fmt: skip


def rows_of(cases):
    """A row of each case, ours in a second and every peer in two."""
    return [
        row(
            case.op, case.shape, str(case.dtype).removeprefix("torch."), **dict.fromkeys(list(case.candidates)[1:], 2.0)
        )
        for case in cases
    ]


def model(timed, rate, patched=True, prompts=1, **more):
    """A row of bench model, of a model of 8 GB."""
    return {
        "timed": timed, "patched": patched, "tokens_per_second": rate, "between_tokens": {"p50": 1 / rate},
        "kv": {"held_over_used": None}, "workload": {"prompts": prompts}, "weight_bytes": 8e9, **more,
    }  # fmt: skip


MODELS = [
    model("one by one", 20.0, False), model("compiled, static cache", 100.0, False), model("fusedops", 120.0),
    model("fusedops int8", 220.0), model("transformers paged", 500.0, False, 32),
    model("fusedops paged", 1200.0, True, 32, kv={"held_over_used": 1.02}),
]  # fmt: skip
HOST = [
    {"op": op, "seconds": seconds}
    for op, seconds in (("rms_norm", 3.0), ("empty_like", 1.0), ("kernel[grid] of rms_norm", 10.0))
]


def test_every_operator_is_measured(gpu_cases):
    assert set(fusedops.OPERATORS) <= {case.op for cases in gpu_cases.values() for case in cases}


def test_every_goal_is_judged_by_what_the_benchmarks_and_stages_write(goals, gpu_cases):
    """A part that no row tells about would be one whose row, peer or figure has another name."""
    rows = rows_of(case for cases in gpu_cases.values() for case in cases)
    rows += [row("rms_norm", "1x4096", timed=EAGER, torch=2.0)]
    judged = goals.judge(rows, HOST, MODELS)
    assert {goal.number for goal in judged} == set(range(1, 13))
    assert [str(goal) for goal in judged if goal.met is None] == []
    assert [str(goal) for goal in goals.judge([]) if goal.met is not None] == []


def test_peers_of_sparse_products_are_told_apart(goals, gpu_cases):
    module = loaded("bench_sparse_matmul")
    for case in gpu_cases["bench_sparse_matmul"]:
        for name in list(case.candidates)[1:]:
            assert name.startswith(goals.DENSE) is (name in case.against) is not (name in module.SPARSE)


def attention(dtype="bfloat16", shape="1x8192x32/8x128 causal", seconds=1.0, **more):
    return row("attention", shape, dtype, seconds, **more)


def paged(shape, seconds=1.0, dtype="bfloat16", **peers):
    return row("paged_attention", shape, dtype, seconds, **peers)


def norm(op="rms_norm", shape="8192x4096", **more):
    return row(op, shape, **more)


def fp8(shape, seconds=1.0, **more):
    return row("fp8_matmul", shape, seconds=seconds, **more)


def int8(shape, seconds=1.0, peer=None):
    return row("int8_matmul", shape, seconds=seconds, **({"_int_mm, compiled epilogue": peer} if peer else {}))


def sparse(shape, *peers, of="_int_mm"):
    return row("sparse_matmul", shape, **{f"{of} {index}": peer for index, peer in enumerate(peers)})


def steps(*seconds):
    return [paged(f"{batch}x8192, page 16", time) for batch, time in zip((1, 2, 4), seconds)]


def eight_bit(shape, peer, share=0.9, op="weight_only_matmul"):
    return row(op, shape, **{"F.linear of the expanded weight": peer}) | {"share_of_copy_bandwidth": share}


LOW_SHARES = {"share_of_copy_bandwidth": 0.8, "share_of_matmul_rate": 0.79}
SKEWED, EVEN = "1x128k and 31x4k, page 16", "even, page 16"


@pytest.mark.parametrize(
    ("begins", "rows", "met"),
    [
        ("attention of a prompt", [attention(cudnn=1.5, fa3=0.97)], True),
        ("attention of a prompt", [attention(cudnn=1.5, fa3=0.96)], False),
        ("attention of a prompt", [attention(shape="1x1:8192x32/8x128", fa3=0.5)], None),
        ("causal attention", [attention()], True),
        ("causal attention", [attention() | LOW_SHARES], False),
        ("causal attention", [attention(shape="1x4096x32/8x128 causal") | LOW_SHARES], None),
        ("attention in float8", [attention(), attention("float8_e4m3fn", seconds=0.68)], True),
        ("attention in float8", [attention(), attention("float8_e4m3fn", seconds=0.70)], False),
        ("attention in float8", [attention(shape="1x4x1/1x8"), attention("float8_e4m3fn", seconds=0.70)], None),
        ("decoding from 256", [paged("1x8192, page 16") | {"share_of_copy_bandwidth": 0.91}], True),
        ("decoding from 256", [paged("1x8192, page 16") | LOW_SHARES], False),
        ("decoding from 256", [paged("1x8192, page 16") | LOW_SHARES | {"bytes": 2**27}], None),
        ("decoding by the best", [paged("a", fa=1.0)] * 9 + [paged("b", fa=0.95)], True),
        ("decoding by the best", [paged("a", fa=1.0)] * 8 + [paged("b", fa=0.95)] * 2, False),
        ("decoding by the best", [paged("a", fa=1.0)] * 9 + [paged("b", fa=0.94)], False),
        ("decoding from float8", [paged("a"), paged("a", 0.56, "float8_e4m3fn")], True),
        ("decoding from float8", [paged("a"), paged("a", 0.57, "float8_e4m3fn")], False),
        ("decoding from pages", [paged("a, page 16", 1.03), paged("a, page 64")], True),
        ("decoding from pages", [paged("a, page 16", 1.04), paged("a, page 64")], False),
        ("decoding from pages", [paged("a, page 16"), paged("b, page 64")], None),
        ("decoding of one long", [paged(SKEWED, 1.15), paged(EVEN)], True),
        ("decoding of one long", [paged(SKEWED, 1.16), paged(EVEN)], False),
        ("decoding, time", steps(1.0, 2.2, 4.4), True),
        ("decoding, time", steps(1.0, 2.0, 4.5), False),
        ("rms_norm of 8,192", [norm(), norm("add_rms_norm")], True),
        ("rms_norm of 8,192", [norm(), norm("add_rms_norm") | {"share_of_copy_bandwidth": 0.96}], False),
        ("rms_norm of 8,192", [norm(shape="4096x4096") | LOW_SHARES], None),
        ("rms_norm by QuACK", [norm(quack=1.0, torch=0.5)], True),
        ("rms_norm by QuACK", [norm(quack=1.0, liger=0.99)], False),
        ("rms_norm to int8", [norm("rms_norm_quantized") | {"share_of_copy_bandwidth": 0.89}], True),
        ("rms_norm to int8", [norm("add_rms_norm_quantized") | {"share_of_copy_bandwidth": 0.87}], False),
        ("rms_norm to float8", [norm("rms_norm_quantized", "8192x4096 float8", flashinfer=1.2)], True),
        ("rms_norm to float8", [norm("rms_norm_quantized", "8192x4096 float8", flashinfer=1.1)], False),
        ("fp8_matmul by", [fp8("4096x1x1 rows", _scaled_mm=1.1), fp8("1024x1x1 rows", _scaled_mm=0.97)], True),
        ("fp8_matmul by", [fp8("4096x1x1 rows", _scaled_mm=9.0), fp8("1024x1x1 rows", _scaled_mm=0.95)], False),
        ("fp8_matmul by", [fp8("4096x1x1 rows", _scaled_mm=1.0), fp8("1024x1x1 rows", _scaled_mm=0.97)], False),
        ("fp8_matmul by", [fp8("64x1x1 rows", _scaled_mm=2.0), fp8("4096x1x1 blocks", _scaled_mm=2.0)], None),
        ("fp8_matmul with", [fp8("4096x1x1 blocks", deep_gemm=0.97)], True),
        ("fp8_matmul with", [fp8("4096x1x1 blocks", deep_gemm=0.96, _scaled_mm=2.0)], False),
        ("int8_matmul by _int_mm", [int8("4096x1x1 rows", peer=1.4)], True),
        ("int8_matmul by _int_mm", [int8("4096x1x1 rows", peer=1.2)], False),
        ("int8_matmul by fp8", [int8("1x1x1 rows", 1.15), fp8("1x1x1 rows")], True),
        ("int8_matmul by fp8", [int8("1x1x1 rows", 1.16), fp8("1x1x1 rows")], False),
        ("int8_matmul by fp8", [int8("1x1x1 rows"), fp8("2x1x1 rows")], None),
        ("products of 1 to 64", [eight_bit("int8 64x4096x14336", 1.0)], True),
        ("products of 1 to 64", [eight_bit("64x4096x14336 rows", 1.0, 0.87, "fp8_matmul")], False),
        ("products of 1 to 64", [eight_bit("int4 1x4096x14336", 1.0, 0.1), eight_bit("fp8 1x64x64", 1.0, 0.1)], None),
        ("products of 1 to 32", [eight_bit("int8 32x4096x14336", 1.75)], True),
        ("products of 1 to 32", [eight_bit("int8 32x4096x14336", 1.7)], False),
        ("products of 1 to 32", [eight_bit("int8 64x4096x14336", 1.7)], None),
        ("sparse_matmul by the best dense product, M >= 2048", [sparse("2048x1x1", 1.4)], True),
        ("sparse_matmul by the best dense product, M >= 2048", [sparse("2048x1x1", 1.4, 1.3)], False),
        ("sparse_matmul by the best dense product, M <= 64", [sparse("64x1x1", 1.45)], False),
        ("sparse_matmul by the best dense product, everywhere", [sparse("512x1x1", 0.98)], False),
        ("sparse_matmul by the best dense product, everywhere", [sparse("512x1x1", 0.98, of="_cslt_sparse_mm")], None),
        ("rms_norm of 1x4096", [norm(), norm(shape="1x4096", timed=EAGER, torch=1.0, liger=0.1)], True),
        ("rms_norm of 1x4096", [norm(), norm(shape="1x4096", timed=EAGER, torch=0.9)], False),
        ("rms_norm of 1x4096", [norm(shape="1x4096", timed=EAGER, torch=0.9)], None),
    ],
)
def test_goals_over_rows(goals, begins, rows, met):
    (goal,) = [goal for goal in goals.judge(rows) if goal.asked.startswith(begins)]
    assert goal.met is met
    assert str(goal).endswith({None: "[not run]", True: "[met]", False: "[no]"}[met])
    assert all(goal.met is None for goal in goals.judge([one | {"timed": EAGER} for one in rows]))


@pytest.mark.parametrize(
    ("begins", "changed", "met"),
    [
        ("patched model, one request", {"fusedops": 102.6}, True),
        ("patched model, one request", {"fusedops": 102.4}, False),
        ("patched model in int8", {"fusedops int8": 204.1}, True),
        ("patched model in int8", {"fusedops int8": 203.9}, False),
        ("patched model by eager", {"one by one": 30.0}, True),
        ("patched model by eager", {"one by one": 30.1}, False),
        ("patched model by torch.compile", {"compiled, static cache": 109.0}, True),
        ("patched model by torch.compile", {"compiled, static cache": 110.0}, False),
        ("patched paged model", {"fusedops paged": 1000.0}, True),
        ("patched paged model", {"fusedops paged": 999.0}, False),
    ],
)
def test_goals_of_models(goals, begins, changed, met):
    models = [one | {"tokens_per_second": changed.get(one["timed"], one["tokens_per_second"])} for one in MODELS]
    models = [one | {"between_tokens": {"p50": 1 / one["tokens_per_second"]}} for one in models]
    (goal,) = [goal for goal in goals.judge([row("rms_norm", "1x1")], (), models) if goal.asked.startswith(begins)]
    assert goal.met is met


@pytest.mark.parametrize(("held", "met"), [(1.04, True), (1.05, False), (None, None)])
def test_memory_of_keys_and_values(goals, held, met):
    models = [one | ({"kv": {"held_over_used": held}} if one["patched"] else {}) for one in MODELS]
    assert [goal.met for goal in goals.judge([], (), models) if goal.asked.startswith("KV bytes")] == [met]


@pytest.mark.parametrize(
    ("unit", "seconds", "met"),
    [("empty_like", 4.0, True), ("empty_like", 4.1, False), ("kernel[grid]", 3.5, True), ("kernel[grid]", 3.6, False)],
)
def test_cost_on_the_host(goals, unit, seconds, met):
    host = [one | ({"seconds": seconds} if one["op"] == "rms_norm" else {}) for one in HOST]
    assert [goal.met for goal in goals.judge([], host) if f"on the host by {unit}" in goal.asked] == [met]


def test_operators_have_a_stage_and_a_test_on_a_gpu(goals, tmp_path):
    """What the gate would run: each benchmark is a stage, and each operator is called by a GPU test."""
    plan = list(importlib.import_module("_stages").stages(tmp_path, False, False))
    assert {stage.name for stage in plan if stage.rows} == {name.removeprefix("bench_") for name in SCRIPTS}
    tests = "".join(path.read_text() for path in (BENCHMARKS.parent / "tests/gpu").glob("test_*.py"))
    own = {name for name in fusedops.OPERATORS if getattr(torch.ops.fusedops, name).default._schema.is_mutable}
    assert {name for name in own if f"{name}(" not in tests} == set()

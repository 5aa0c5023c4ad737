"""What `fusedops inspect` says: loops and their instructions, occupancy, bounds, and calls for GPUs not at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedops
from fusedops._core import cubin, inspection, roofline, sass
from fusedops._core.device import TARGETS, described, limits
from fusedops._core.diversion import diverted
from fusedops._core.occupancy import MULTIPROCESSORS, Occupancy, occupancy
from tests.core.test_cubin import listing

ROOT = Path(__file__).resolve().parents[2]
KIB = 1024


def working(*lines):
    """(depth, matrix instructions, global loads) of the loops that do the work."""
    return [
        (loop["depth"], sum(sass.matrix(loop["instructions"]).values()),
         sass.number(loop["instructions"], sass.GLOBAL_LOADS))
        for loop in listing(*lines)["loops"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # what stands before and behind a loop is no part of it
        (("LDG R1", ".L_a:", "LDG R1", "HMMA.16816 R2", "HMMA.16816 R3", "@P0 BRA `(.L_a)", "HMMA R4", "EXIT"),
         [(1, 2, 1)]),
        # a loop that waits inside of the one that works; its own copy out of line jumps back
        ((".L_a:", ".L_w:", "SYNCS", "@!P1 BRA `(.L_w)", "HGMMA.64x64x16 R2", "@P0 BRA `(.L_a)", "EXIT"), [(1, 1, 0)]),
        ((".L_a:", "@!P1 BRA `(.L_s)", ".L_b:", "QGMMA R2", "@P0 BRA `(.L_a)", "EXIT", ".L_s:", "LDG R3",
          "BRA `(.L_b)"), [(1, 1, 1)]),
        # of two loops around one another the inner one, with how deep it stands
        ((".L_a:", "LDG R1", ".L_b:", "LDG R2", "IMMA R3", "@P0 BRA `(.L_b)", "STG R3", "@P1 BRA `(.L_a)", "EXIT"),
         [(2, 1, 1)]),
        # producer and consumer each have theirs, in the order of the code
        ((".L_a:", "UTMALDG.2D", "@P0 BRA `(.L_a)", ".L_b:", "UTCHMMA R1", "@P0 BRA `(.L_b)", "EXIT"),
         [(1, 0, 1), (1, 1, 0)]),
        # products in the outer loop, loads in the inner one: both work
        ((".L_a:", "NOP", ".L_b:", "LDGSTS.E.128 R1", "@P0 BRA `(.L_b)", "HMMA R1", "@P1 BRA `(.L_a)", "EXIT"),
         [(1, 1, 1), (2, 0, 1)]),
        # a loop that neither loads nor multiplies, and code without any
        ((".L_a:", "FADD R1", "LDS R2", "@P0 BRA `(.L_a)", "EXIT"), []),
        (("LDG R1", "FFMA R2", "STG R1", "EXIT"), []),
    ],
)  # fmt: skip
def test_loops_that_work(lines, expected):
    assert working(*lines) == expected


def test_the_main_loop_multiplies_most():
    def loop(**counts):
        return {"depth": 1, "instructions": counts}

    loads, some, most = loop(LDG=9), loop(HMMA=2, LDG=1), loop(HMMA=3)
    assert sass.main_loop([loads, some, most]) is most
    assert sass.main_loop([loads, loop(LDG=2)]) is loads
    assert sass.main_loop([]) is None


COUNTED = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry _counted_kernel(.param .u64 in, .param .u64 out, .param .u32 n) .reqntid 128
{
    .reg .pred %p; .reg .b32 %n, %i, %a<9>, %b<9>, %c<9>; .reg .f32 %d<9>; .reg .b64 %in, %out;
    ld.param.u64 %in, [in]; ld.param.u64 %out, [out]; ld.param.u32 %n, [n];
    cvta.to.global.u64 %in, %in; cvta.to.global.u64 %out, %out;
    ld.global.v4.b32 {%c0, %c1, %c2, %c3}, [%in+4096];
    mov.b32 %d0, %c0; mov.b32 %d1, %c1; mov.b32 %d2, %c2; mov.b32 %d3, %c3;
    mov.u32 %i, 0;
AGAIN:
    .pragma "nounroll";
    ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%in];
    ld.global.v2.b32 {%b0, %b1}, [%in+1024];
    ld.global.b32 %b2, [%in+2048];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%b0, %b1},
        {%d0, %d1, %d2, %d3};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%d0, %d1, %d2, %d3}, {%a1, %a0, %a3, %a2}, {%b2, %b1},
        {%d0, %d1, %d2, %d3};
    add.u64 %in, %in, 512;
    add.u32 %i, %i, 1;
    setp.lt.u32 %p, %i, %n;
    @%p bra AGAIN;
    st.global.v4.f32 [%out], {%d0, %d1, %d2, %d3};
    ret;
}
"""


@pytest.mark.compile
def test_a_kernel_of_known_counts(tmp_path):
    (tmp_path / "kernel.ptx").write_text(COUNTED)
    code = tmp_path / "kernel.cubin"
    cubin._run_tool("ptxas", "--gpu-name=sm_80", str(tmp_path / "kernel.ptx"), "-o", str(code))
    metadata = SimpleNamespace(name="_counted_kernel", num_warps=4, shared=0)
    kernel = SimpleNamespace(asm={"ptx": COUNTED, "cubin": code.read_bytes()}, metadata=metadata)
    first, second = cubin.read_all([kernel, kernel])
    assert first == second == cubin.read(kernel)
    (loop,) = first.loops
    assert sass.matrix(loop["instructions"]) == {"HMMA.16816.F32.BF16": 2}
    assert {name: first.count(name) for name in ("LDG", "STG", "HMMA")} == {"LDG": 4, "STG": 1, "HMMA": 2}
    assert sass.number(loop["instructions"], ("LDG",)) == 3 and sass.number(loop["instructions"], ("STG",)) == 0
    assert roofline.bytes_in_flight(first, 128) == 128 * (16 + 8 + 4) and roofline.kind_of(first) == "fp16"


# (capability, warps, registers, shared memory) to (programs, what limits), from the CUDA occupancy calculator's rules
OCCUPANCIES = [
    ((90, 4, 128, 0), 4, "registers"),  # 4096 registers a warp, 4 warps in each of 4 partitions
    ((90, 4, 129, 0), 3, "registers"),  # 4352: 3 warps each
    ((90, 8, 32, 0), 8, "registers"),  # 64 warps, as threads allow
    ((90, 8, 33, 0), 6, "registers"),
    ((90, 12, 168, 197000), 1, "registers"),
    ((90, 1, 255, 0), 8, "registers"),
    ((90, 1, 96, 0), 20, "registers"),  # 5 warps a partition; in one file of registers there would be room for 21
    ((90, 4, 16, 113 * KIB), 2, "shared memory"),  # with the block's own KiB exactly half of 228
    ((90, 4, 16, 113 * KIB + 1), 1, "shared memory"),
    ((90, 4, 16, 227 * KIB), 1, "shared memory"),
    ((90, 4, 16, 228 * KIB), 0, "shared memory"),
    ((80, 4, 16, 81 * KIB), 2, "shared memory"),
    ((86, 4, 16, 49 * KIB), 2, "shared memory"),
    ((86, 4, 16, 49 * KIB + 128), 1, "shared memory"),
    ((75, 4, 16, 32 * KIB), 2, "shared memory"),  # nothing is reserved there
    ((90, 16, 32, 0), 4, "registers"),
    ((86, 16, 32, 0), 3, "threads"),
    ((75, 16, 32, 0), 2, "threads"),
    ((90, 1, 16, 0), 32, "blocks"),
    ((86, 1, 16, 0), 16, "blocks"),
    ((89, 1, 16, 0), 24, "blocks"),
    ((120, 1, 16, 0), 24, "blocks"),
    ((75, 1, 16, 0), 16, "blocks"),
    ((90, 32, 64, 0), 1, "registers"),
    ((90, 32, 65, 0), 0, "registers"),
]


@pytest.mark.parametrize(("needs", "programs", "limited_by"), OCCUPANCIES)
def test_occupancy(needs, programs, limited_by):
    found = occupancy(*needs)
    capability, num_warps, _, _ = needs
    assert (found.programs, found.limited_by) == (programs, limited_by)
    assert found.warps == programs * num_warps
    assert found.share == found.warps * 32 / MULTIPROCESSORS[capability].threads


def test_multiprocessors_agree_with_the_targets():
    for target in TARGETS.values():
        device = MULTIPROCESSORS[target.capability]
        assert device.shared - device.reserved == target.shared_memory
    with pytest.raises(ValueError, match="capability must be one of 75, .*, got 70"):
        occupancy(70, 4, 32, 0)


def report(loop, shared=0, warps=4, **counts):
    loops = [{"depth": 1, "instructions": loop}] if loop else []
    return cubin.CubinReport("_kernel", "sm_90a", warps, 32, 0, shared, 0, 0, False, counts or loop, loops)


H100 = TARGETS["sm_90a"]
FULL = Occupancy(2, 8, 0.125, {"registers": 2})


@pytest.mark.parametrize(
    ("num_bytes", "operations", "found", "programs", "limiter"),
    [
        (3.35e9, 1e9, report({"LDG.E.128": 4}), 2640, "memory"),
        (3.35e6, 989e9, report({"HGMMA.64x64x16": 4, "LDGSTS.E.128": 1}, 65536), 2640, "tensor cores"),
        (3.35e6, 1979e9, report({"QGMMA.64x64x32": 4, "LDGSTS.E.128": 1}, 65536), 2640, "tensor cores"),
        (3.35e6, 66.9e9, report({"LDG.E.128": 4}), 2640, "arithmetic"),
        (3.35e9, 1e9, report({"LDG.E": 1}), 2640, "latency"),  # 512 bytes in each program's flight
        (3.35e6, 989e9, report({"HMMA.16816": 4, "LDGSTS.E.128": 1}, 65536), 66, "idle multiprocessors"),
    ],
)
def test_limiter(num_bytes, operations, found, programs, limiter):
    bound = roofline.bound(H100, num_bytes, operations, found, programs, FULL)
    assert bound.limiter == limiter
    assert bound.memory == pytest.approx(num_bytes / 3.35e12)
    assert bound.seconds == max(bound.memory, bound.arithmetic)
    assert bound.arithmetic == pytest.approx(operations / roofline.peak(H100, bound.kind))
    assert bound.rounds == pytest.approx(programs / 264)


def test_arithmetic_of_a_bound():
    loads = report({"LDG.E.128": 2, "LDG.E.U16": 1, "STG.E.128": 9})
    bound = roofline.bound(H100, 1e6, 1e6, loads, 1000, FULL)
    assert bound.in_flight == 264 * 128 * (2 * 16 + 2)  # 1000 programs, of which 264 have a place
    assert bound.latency == pytest.approx(1e6 * 600e-9 / bound.in_flight)
    assert bound.needed == round(3.35e12 * 600e-9)
    assert bound.uneven == pytest.approx(bound.arithmetic / (1000 / 1056))  # 4 rounds of 264
    few = roofline.bound(H100, 1e6, 1e6, loads, 33, FULL)
    assert few.uneven == pytest.approx(few.arithmetic * 4) and few.in_flight == 33 * 128 * 34


@pytest.mark.parametrize(
    ("opcodes", "kind"),
    [({"HGMMA.64x64x16.F32.TF32": 1}, "tf32"), ({"IGMMA.64x64x32": 1}, "int8"), ({"UTCQMMA": 1}, "fp8"),
     ({"QGMMA": 1, "HGMMA": 3}, "fp8"), ({"UTCHMMA": 1}, "fp16"), ({"FFMA": 8}, "fp32")],
)  # fmt: skip
def test_kind_of_products(opcodes, kind):
    assert roofline.kind_of(report(opcodes)) == kind
    assert roofline.peak(H100, "tf32") == roofline.peak(H100, "fp16") / 2


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_launches_are_recorded_and_not_made():
    x, weight = torch.full((64, 1024), 2.0), torch.ones(1024)
    ((operator, args),) = inspection.operator_calls(fusedops.rms_norm, (x, weight), {})
    assert all(arg.device.type == "meta" for arg in args[:2])
    (launch,) = inspection.record(operator, args, TARGETS["sm_80"])
    assert launch.kernel.fn.__name__ == "_rms_norm_kernel" and launch.grid == (64, 1, 1)
    assert launch.keywords["BLOCK_N"] == 1024 and torch.equal(x, torch.full((64, 1024), 2.0))


def test_tensors_keep_what_specialises_kernels():
    whole = torch.zeros(4, 65)
    found = inspection._without_memory(whole[:, 1:])
    assert found.data_ptr() % 16 == whole[:, 1:].data_ptr() % 16 == 4
    assert found.stride() == (65, 1) and found.shape == (4, 64) and inspection._without_memory(3.0) == 3.0


def test_described_limits_end_with_their_block():
    here = limits(torch.device("cpu"))
    with described(TARGETS["sm_86"]):
        assert limits(torch.device("meta")) is TARGETS["sm_86"]
        with described(TARGETS["sm_80"]):
            assert limits(torch.device("cpu")) is TARGETS["sm_80"]
        assert limits(torch.device("cpu")) is TARGETS["sm_86"]
    assert limits(torch.device("cpu")) == here


def test_diverted_launches_end_with_their_block():
    seen = []
    x, weight = torch.ones(2, 64), torch.ones(64)
    ((operator, args),) = inspection.operator_calls(fusedops.rms_norm, (x, weight), {})
    with diverted(lambda *launch: seen.append(launch)):
        operator.launcher()(*args)
    assert len(seen) == 1
    out = operator.launcher()(x, weight, 1e-6, 0.0, "once")
    torch.testing.assert_close(out, x) and len(seen) == 1


def test_backward_has_its_own_kernels():
    calls = inspection.operator_calls(fusedops.rms_norm, (meta(4, 64), meta(64)), {}, backward=True)
    assert [operator.name for operator, _ in calls] == ["rms_norm_backward"]
    with pytest.raises(NotImplementedError, match="no derivative"):
        inspection.operator_calls(fusedops.quantize_int8, (meta(4, 64),), {}, backward=True)


@pytest.mark.parametrize(
    ("op", "target", "error", "message"),
    [
        ("rms", "sm_90a", ValueError, "inspect: op must be one of add_layer_norm, .*, got 'rms'"),
        ("rms_norm", "sm_70", ValueError, "inspect: target must be one of sm_75, .*, got 'sm_70'"),
        ("rms_norm", "sm_75", ValueError, "on Tesla T4 it runs on torch .*needs compute capability 8.0"),
        ("rms_norm", "sm_90a", RuntimeError, "without TRITON_INTERPRET=1"),
    ],
)
def test_rejects(op, target, error, message, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path))
    with pytest.raises(error, match=message):
        fusedops.inspect(op, meta(4, 64), meta(64), target=target)


def test_nothing_launched_is_refused():
    with pytest.raises(ValueError, match="must launch a kernel, the call launches none"):
        fusedops.inspect("rms_norm", meta(0, 64), meta(64), target="sm_90a")


@pytest.mark.parametrize("target", ["sm_75", "sm_80"])
def test_explain_asks_the_target_what_it_supports(target):
    q = meta(1, 64, 2, 64, dtype=torch.float8_e4m3fn)
    found = fusedops.explain("attention", q, q, q, target=target)
    assert found.backend == "torch"
    reason = "needs compute capability 8.0" if target == "sm_75" else "float8 needs compute capability 8.9"
    assert reason in dict(found.rejected)["triton"]


COMMANDS = """
import json, os, sys
from fusedops._core import cubin
from fusedops.cli import main
compiled, compile_bound = [], cubin.compile_bound
cubin.compile_bound = lambda binding: compiled.append(binding.name) or compile_bound(binding)
for command in json.loads(sys.argv[1]):
    status = main(["inspect", *command])
    print("\\n" + json.dumps({"status": status, "compiled": compiled}) + "\\n---")
    compiled.clear()
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each command prints in one process after the other, and what it compiled."""
    rms = ["rms_norm", "--shape", "64x1024", "--target"]
    few = ["weight_only_matmul", "--shape", "4x512", "--compare", "default"]
    commands = [
        [*rms, "sm_90a"], [*rms, "sm_90a", "--json"], [*rms, "sm_80", "--backward", "--json"],
        ["fp8_matmul", "--shape", "256x256", "--target", "sm_90a", "--json"], [*rms, "sm_75"],
        ["rms_norm", "--shape", "0x8"],
        [*few, "num_warps=8", "--target", "sm_86"], [*few, "num_warps=8", "--target", "sm_86", "--json"],
        [*few, "num_warps=5"], [*few, "warps=8"],
        ["quantize_int4", "--shape", "4x512", "--compare", "default", "block_q=8"],
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("inspect")
    environment |= {"FUSEDOPS_CACHE_DIR": str(folder / "ours"), "TRITON_CACHE_DIR": str(folder / "triton")}
    ended = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = []
    for part in ended.stdout.split("\n---\n")[:-1]:
        text, _, state = part.strip().rpartition("\n")
        found.append((text.strip(), json.loads(state)))
    return found, ended.stderr


@pytest.mark.compile
def test_the_command_prints_a_table(printed):
    (text, state), *_ = printed[0]
    assert state == {"status": 0, "compiled": ["_rms_norm_kernel"]}
    lines = dict(line.split("  ", 1) for line in text.splitlines() if line)
    lines = {label: value.strip() for label, value in lines.items()}
    assert lines["device"] == "H100 SXM, sm_90a" and lines["grid"] == "64 x 1 x 1" and lines["spills"] == "none"
    assert lines["bytes"] == f"{2 * 64 * 1024 * 2 + 1024 * 2:,}" and "LDG.E.128" in lines["loads in all"]
    assert lines["memory"].startswith("0.08 us") and "RowConfig(block_m=1, block_n=1024" in lines["configuration"]


@pytest.mark.compile
def test_json_says_the_same_and_compiles_nothing_twice(printed):
    text, state = printed[0][1]
    assert state == {"status": 0, "compiled": []}
    found = json.loads(text)
    (kernel,) = found["kernels"]
    counted = cubin.CubinReport.from_dict(kernel["report"])
    assert counted.target == found["arch"] == "sm_90a" and counted.wide_loads and counted.wide_stores
    held = occupancy(90, counted.num_warps, counted.registers, counted.shared_bytes)
    assert kernel["occupancy"] == held.as_dict() and found["bound"]["memory"] == found["bytes"] / H100.bandwidth


@pytest.mark.compile
def test_derivatives_and_hopper_kernels(printed):
    (text, state), (hopper, _) = printed[0][2:4]
    assert state["compiled"] == ["_rms_norm_backward_kernel"]
    found = json.loads(text)
    assert found["arch"] == "sm_80" and found["bytes"] is None and "does not say" in found["bound_missing"]
    found = json.loads(hopper)
    (kernel,) = found["kernels"]
    assert kernel["kernel"] == "_scaled_matmul_hopper_kernel" and kernel["report"]["num_warps"] == 12
    # a tile of 128 by block_n and 128 of depth: two warpgroups, each 64 rows by 4 times 32 of depth
    products = sass.matrix(kernel["main_loop"]["instructions"])
    assert sum(products.values()) == 4 and all(opcode.startswith("QGMMA.64x") for opcode in products)
    assert found["bound"]["kind"] == "fp8"


@pytest.mark.compile
def test_two_configurations_side_by_side(printed):
    (table, state), (text, again) = printed[0][6:8]
    assert state["compiled"] == 2 * ["_weight_only_kernel"] and again == {"status": 0, "compiled": []}
    default, forced = (one["kernels"][0] for one in json.loads(text).values())
    assert default["report"]["num_warps"] == 4 and forced["report"]["num_warps"] == 8
    (warps,) = [line.split()[1:] for line in table.splitlines() if line.startswith("warps")]
    assert warps == ["4", "8"] and "num_warps=8 _weight_only_kernel" in table


@pytest.mark.compile
def test_what_cannot_be_inspected_ends_with_status_2(printed):
    found, errors = printed
    assert [state["status"] for _, state in (*found[4:6], *found[8:])] == [2] * 5
    assert "fusedops inspect: rms_norm must run on its Triton kernels, on Tesla T4 it runs on torch" in errors
    assert "fusedops inspect: rms_norm must launch a kernel" in errors
    assert "config must be one that H100 SXM holds and the kernel takes (block_m of" in errors
    assert "config must name parameters of the kernel (block_m" in errors and "got warps=8" in errors
    assert errors.count("config must name parameters of the kernel (") == 2 and "got block_q=8" in errors

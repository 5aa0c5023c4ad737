"""Reading machine code: loops and spills from listings, and real kernels for every target."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedops._core import cubin, sass
from fusedops._core.launch import KernelExample

ROOT = Path(__file__).resolve().parents[2]


def listing(*lines):
    """What is found in instructions; labels stand for the addresses behind them, as in nvdisasm's raw listings."""
    code = [line for line in lines if not line.endswith(":")]
    places = {line[:-1]: 16 * sum(not other.endswith(":") for other in lines[:i]) for i, line in enumerate(lines)}
    text = "\n".join(f"        /*{16 * index:04x}*/              {line} ;" for index, line in enumerate(code))
    text = re.sub(r"`\((\S+)\)", lambda found: f"0x{places[found[1]]:x}", text)
    (parsed,) = sass.parse_all(text, [16 * len(code)])
    return parsed


@pytest.mark.parametrize(
    ("lines", "in_loop"),
    [
        (("STL [R1], R2", ".L_x_0:", "LDG.E.128 R4, desc[UR4][R2.64]", "@P0 BRA `(.L_x_0)", "EXIT"), False),
        ((".L_x_0:", "STL [R1], R2", "@P0 BRA `(.L_x_0)", "EXIT"), True),
        ((".L_x_0:", "@!P1 LDL R2, [R1]", "IADD3 R3, R3, 1, RZ", "BRA.U UP0, `(.L_x_0)", "EXIT"), True),
        # A cold block behind the end that jumps back is no loop, nor is the trap that jumps to itself.
        (("@P0 BRA `(.L_x_1)", ".L_x_0:", "STL [R1], R2", "EXIT", ".L_x_1:", "BRA `(.L_x_0)"), False),
        (("STL [R1], R2", "EXIT", ".L_x_0:", "BRA `(.L_x_0)"), False),
        # The inner block of two nested loops, and one behind the loop that only the loop's exit reaches.
        ((".L_x_0:", ".L_x_1:", "STL [R1], R2", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)", "EXIT"), True),
        ((".L_x_0:", "NOP", "@P0 BRA `(.L_x_0)", "LDL R2, [R1]", "EXIT"), False),
        ((".L_x_0:", "CALL.REL.NOINC `(.L_x_2)", "LDL R2, [R1]", "@P0 BRA `(.L_x_0)", "EXIT", ".L_x_2:", "RET"), True),
    ],
)
def test_spills_in_loops_are_told_from_others(lines, in_loop):
    parsed = listing(*lines)
    assert parsed["spill_in_loop"] == in_loop
    assert parsed["spill_stores"] + parsed["spill_loads"] == sum("STL" in line or "LDL" in line for line in lines)


def test_instructions_are_counted_with_their_modifiers():
    parsed = listing(
        "@P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "LDG.E.LTC128B R4, [R2.64]", "LDGSTS.E.128 [R1], [R2]",
        "STG.E.U16 [R2.64], R4", "STG.E.EF.128 [R2.64], R4", "EXIT",
    )  # fmt: skip
    report = cubin.CubinReport("_kernel", "sm_80", 4, 32, 0, 0, **parsed)
    assert (report.wide_loads, report.wide_stores) == (2, 1)
    assert (report.count("LDG"), report.count("STG"), report.count("LD")) == (2, 2, 0)
    assert cubin.CubinReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def plain_function(x_ptr):
    """Stands for a kernel that the interpreter wrapped."""


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("hopper", ValueError, "target must look like 'sm_90a', got 'hopper'"),
        ("sm_90a", RuntimeError, "without TRITON_INTERPRET=1"),
    ],
)
def test_rejects(target, error, message):
    with pytest.raises(error, match=message):
        cubin.report(KernelExample(plain_function, {"x_ptr": "*fp32"}, {}), target)


@pytest.mark.compile
def test_a_kernel_compiles_for_every_target(tmp_path):
    code = """
import dataclasses, json
from fusedops._core import cubin, sass
from fusedops._core.device import TARGETS
from tests.data.planted_triton import examples
reports = [cubin.report(examples("bf16", limits)[0], arch).as_dict() for arch, limits in TARGETS.items()]
try:
    cubin.report(dataclasses.replace(examples("bf16", None)[0], constants={"BLOK": 8}), "sm_80")
except ValueError as error:
    print(json.dumps([reports, str(error)]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    reports, message = json.loads(ended.stdout)
    assert message == "cubin: types and constants must describe _good_kernel, differ in ['BLOCK', 'BLOK']"
    targets = [report["target"] for report in reports]
    assert targets == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
    for values in reports:
        report = cubin.CubinReport.from_dict(values)
        assert report.kernel == "_good_kernel" and report.wide_loads and report.wide_stores
        assert 0 < report.registers < 64 and report.num_warps == 4
        assert (report.stack_bytes, report.spill_stores, report.spill_loads, report.shared_bytes) == (0, 0, 0, 0)

"""golden: recorded and checked here with the emulator in the device's place; the driver's calls against a stub."""

import json
import zipfile

import pytest

from fusedops.testing.ptx import golden
from fusedops.testing.ptx.__main__ import main
from fusedops.testing.ptx.device import Device

SUITE = '''
import pytest
import torch
from fusedops.testing import ptx

TEXT = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 k_x, .param .u64 k_out, .param .u32 k_n)
{
.reg .b32 %r<4>; .reg .b64 %rd<3>;
ld.param.b64 %rd1, [k_x];
ld.param.b64 %rd2, [k_out];
ld.param.b32 %r3, [k_n];
ld.global.b32 %r1, [%rd1];
OPERATION.b32 %r2, %r1, %r3;
st.global.b32 [%rd2], %r2;
ret;
}"""


@pytest.mark.parametrize("schedule", ["default", "ahead"])
@pytest.mark.parametrize("name", ["and", "xor"])
def test_logic(name, schedule):
    x, out = torch.tensor([INPUT], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    text = TEXT.replace("OPERATION", name)
    ptx.load(text).launch("k", (1,), (1,), [x, out, 6], schedule=schedule)
    assert out.item() == {"and": INPUT & 6, "xor": INPUT ^ 6}[name]
'''


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "test_small_suite.py"
    path.write_text(SUITE.replace("INPUT", "12"))
    return path


@pytest.fixture
def recorded(tmp_path, suite):
    path = tmp_path / "golden.zip"
    assert main(["golden", "--record", str(path), "--device", "emulator", "--suite", str(suite)]) == 0
    return path


def check(path, suite):
    return main(["golden", "--check", str(path), "--suite", str(suite)])


def test_what_was_recorded_checks(recorded, suite, capsys):
    assert check(recorded, suite) == 0
    assert "2 launches give what emulator gave, bit by bit; 0 do not" in capsys.readouterr().out


def test_a_difference_is_listed_by_instruction(recorded, suite, capsys):
    device, results = golden.read(recorded)
    for result in results.values():
        if "[xor-" in result.test:
            result.outputs = {i: bytes([11, 0, 0, 0]) for i in result.outputs}
    golden.write(recorded, device, results)
    assert check(recorded, suite) == 1
    out = capsys.readouterr().out
    assert "1 launches give what emulator gave, bit by bit; 1 do not" in out
    report = out[out.index("\nxor\n") :]
    assert "test_logic[xor-default]: k_out differs in 1 of 1 words" in report
    assert "device 0x0000000b emulator 0x0000000a" in report


def test_launches_that_changed_are_told_from_differences(recorded, suite, capsys):
    changed = suite.with_name("test_changed_suite.py")
    changed.write_text(SUITE.replace("INPUT", "13"))
    assert check(recorded, changed) == 1
    out = capsys.readouterr().out
    assert "not in the file: 2 launches" in out and "only in the file: 2 launches" in out


def rewritten(path, change):
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def other_format(parts):
    parts["index.json"] = json.dumps({**json.loads(parts["index.json"]), "format": 99})


def other_outputs(parts):
    parts["outputs.bin"] = b"\1" + parts["outputs.bin"][1:]


@pytest.mark.parametrize(
    "change, says",
    [
        (other_format, "has format 99, this version reads 1"),
        (other_outputs, "is damaged: its outputs are not what its index says"),
        (lambda parts: parts.pop("outputs.bin"), "is not a golden file, or damaged"),
        (lambda parts: parts.update({"index.json": "[]"}), "is not a golden file, or damaged"),
    ],
)
def test_a_file_that_cannot_be_used(recorded, suite, capsys, change, says):
    rewritten(recorded, change)
    assert check(recorded, suite) == 2
    assert says in capsys.readouterr().err


def test_no_file_no_archive_no_suite(recorded, suite, tmp_path, capsys):
    assert check(tmp_path / "none", suite) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "text").write_text("golden")
    assert check(tmp_path / "text", suite) == 2
    assert "is not a golden file" in capsys.readouterr().err
    assert check(recorded, tmp_path / "nowhere") == 2
    assert "no tests at" in capsys.readouterr().err


def test_no_driver_is_said():
    with pytest.raises(RuntimeError, match="needs an NVIDIA driver, libno_such_driver.so"):
        Device("libno_such_driver.so")

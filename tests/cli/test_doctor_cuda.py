"""What the doctor says of the CUDA kernels: shipped, made at first use or missing, and what launches them."""

import json

import pytest

from fusedops._core import env
from fusedops._core.cuda import driver, images, toolchain
from fusedops.cli import doctor


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A package of one source, no compiler, no driver, and an empty cache."""
    (tmp_path / "csrc" / "ptx").mkdir(parents=True)
    (tmp_path / "csrc" / "one.cu").write_text("// a kernel\n")
    (tmp_path / "_cubin").mkdir()
    monkeypatch.setattr(images, "sources", lambda: tmp_path / "csrc")
    monkeypatch.setattr(images, "SHIPPED", tmp_path / "_cubin")
    monkeypatch.setattr(toolchain, "found", lambda: None)
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    driver.library.cache_clear()
    images._fingerprint.cache_clear()
    with env.override("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache")):
        yield tmp_path
    images._fingerprint.cache_clear()


def ship(place, *products):
    made_from = toolchain.fingerprint(place / "csrc" / "one.cu")
    for product in products:
        (place / "_cubin" / f"one.{product}").touch()
    manifest = {"fingerprints": {f"one.{product}": made_from for product in products}}
    (place / "_cubin" / "manifest.json").write_text(json.dumps(manifest))


def found():
    return {check.name: (check.status, check.detail) for check in doctor._cuda_kernels()}


def test_nothing_shipped_and_no_compiler(place):
    checks = found()
    every = "sm_80.cubin, sm_90a.cubin, sm_80.ptx, sm_90a.ptx"
    assert checks["one.cu"] == (doctor.ABSENT, f"{every} cannot be made here")
    assert checks["cuda compiler"][0] == doctor.ABSENT and "neither nvcc nor NVRTC" in checks["cuda compiler"][1]
    assert checks["cuda launcher"][0] == doctor.ABSENT and "no NVIDIA driver" in checks["cuda launcher"][1]


def test_what_is_shipped_and_what_a_compiler_makes_of_the_rest(place, monkeypatch):
    monkeypatch.setattr(toolchain, "found", lambda: "NVRTC 12.8")
    ship(place, *toolchain.SHIPPED)
    checks = found()
    parts = "sm_80.cubin shipped; sm_90a.cubin shipped; sm_80.ptx shipped; sm_90a.ptx compiled at first use"
    assert checks["one.cu"] == (doctor.OK, parts)
    assert checks["cuda compiler"] == (doctor.OK, "NVRTC 12.8, for machine code that was not shipped")
    (place / "csrc" / "one.cu").write_text("// another kernel\n")
    images._fingerprint.cache_clear()
    assert "shipped" not in found()["one.cu"][1], "what was made from another source is none"


@pytest.mark.parametrize(("arch", "status"), [("sm_80", "ok"), ("sm_89", "ok"), ("sm_90a", "BROKEN")])
def test_a_gpu_for_which_there_is_nothing(place, monkeypatch, arch, status):
    from fusedops._core import device

    ship(place, "sm_80.cubin")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(device, "limits", lambda at: device.TARGETS[arch])
    assert found()["one.cu"][0] == status


def test_the_launcher(place, monkeypatch):
    monkeypatch.setattr(driver, "library", lambda: object())
    assert found()["cuda launcher"][0] == doctor.OK

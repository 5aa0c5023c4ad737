"""The driver's interface as golden calls it, against a stub that is compiled with the driver's own header."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from fusedops.testing.ptx.device import Device, DeviceError
from fusedops.testing.ptx.tensors import MapRequest

triton = pytest.importorskip("triton", reason="triton, which brings cuda.h, is not installed")
INCLUDE = Path(triton.__file__).parent / "backends/nvidia/include"
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) on the PATH")

REQUEST = MapRequest(
    data_type=9, address=0, sizes=(64, 8), strides=(128,), box=(32, 4), element_strides=(1, 1), interleave=0, swizzle=3,
    l2_promotion=2, fill=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    library = tmp_path_factory.mktemp("driver") / "libstub.so"
    source = Path(__file__).with_name("driver_stub.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-I", INCLUDE, source, "-o", library], check=True)
    return Device(str(library))


def launch(device, **changed):
    arguments = {
        "text": "text", "kernel": "k", "grid": (5, 6, 7), "block": (32, 2, 3), "cluster": (1, 1, 1), "shared": 4096,
        "parameters": [("pointer", 0, 0), struct.pack("I", 77), ("map", 1, 2, REQUEST)],
        "buffers": [(bytes(256), 64), (b"\1\2\3\4", 0)],
    }  # fmt: skip
    out, other = device.run(**{**arguments, **changed})
    assert other == b"\1\2\3\4"
    return struct.unpack("32Q", out)


def test_who_it_is(device):
    assert device.description == "Stub, compute capability 9.0, CUDA 13.1"


def test_shape_and_parameters(device):
    said = launch(device)
    assert said[:9] == (5, 6, 7, 32, 2, 3, 4096, 0, 0)
    assert said[9] == 77
    assert said[10] == 64  # the address has the remainder that was asked for
    assert said[11] == 2  # buffers in use


def test_buffers_are_given_back(device):
    launch(device)
    assert launch(device)[11] == 2


def test_cluster(device):
    said = launch(device, cluster=(2, 1, 4))
    assert said[8] == 1 and said[12:16] == (1, 2, 1, 4)


def test_tensor_map_is_of_the_devices_memory(device):
    said = launch(device)[16:]
    assert said[:3] == (9, 2, 3)  # type, rank, and what lies two bytes into the second buffer
    assert said[3:13] == (64, 8, 128, 32, 4, 1, 0, 3, 2, 1)
    assert said[13] == 0  # maps lie at multiples of 64


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"text": "wrong"}, r"cuModuleLoadDataEx: stubborn \(218\) line 1: no"),
        ({"kernel": "other"}, "GetFunction: stub"),
    ],
)
def test_the_drivers_words(device, changed, says):
    with pytest.raises(DeviceError, match=says):
        launch(device, **changed)

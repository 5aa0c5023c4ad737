"""CUDA kernels are loaded and launched as a driver wants it: against a strict stand-in, no GPU."""

import ctypes
import shutil
import struct
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from fusedops._core import cuda, device
from fusedops._core.cuda import driver, images

STUB = Path(__file__).resolve().parents[1] / "data" / "cuda_driver_stub.c"
CC = next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
pytestmark = pytest.mark.skipif(CC is None, reason="needs a C compiler for the stand-in of the driver")
SYMBOL = "fusedops_scale"


@pytest.fixture(scope="module")
def compiled_stub(tmp_path_factory):
    path = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    subprocess.run([CC, "-shared", "-fPIC", "-o", path, STUB], check=True)
    return path


def forget():
    for cached in (driver.library, driver._primary_context, cuda._module, cuda._encoded, cuda.load):
        cached.cache_clear()


@pytest.fixture
def stub(compiled_stub, monkeypatch, tmp_path):
    """The stand-in's library, fresh; its tensors lie on the CPU."""
    path = tmp_path / "libcuda.so.1"  # a copy: the loader gives each file its own memory
    shutil.copy(compiled_stub, path)
    monkeypatch.setattr(driver, "LIBRARY", str(path))
    monkeypatch.setattr(cuda, "current_stream", lambda index: 0x700 + index)
    monkeypatch.setattr(images, "find", lambda name, target: images.Image(b"\x7fELF\0", "sm_80.cubin", "shipped"))
    forget()
    yield driver.library()
    forget()


def number(stub, name, kind=ctypes.c_int):
    return kind.in_dll(stub, name).value


def launched(stub):
    """(the numbers of the last launch, its parameters' bytes, its stream)."""
    numbers = list((ctypes.c_int * 16).in_dll(stub, "stub_launch"))
    count = number(stub, "stub_count", ctypes.c_size_t)
    parameters = bytes((ctypes.c_ubyte * 1024).in_dll(stub, "stub_parameters"))[:count]
    return numbers, parameters, number(stub, "stub_stream", ctypes.c_void_p)


def launch(kernel, *arguments, **options):
    kernel.launch((5, 4, 3), (64, 2, 1), arguments, **{"device": torch.device("cuda", 0), **options})


def test_the_launch_carries_sizes_stream_and_parameters_as_c_lays_them_out(stub):
    x = torch.zeros(4)
    mapped = cuda.TensorMap(bytes(range(128)))
    arguments = (x, ctypes.c_int32(-7), None, ctypes.c_float(0.5), ctypes.c_int64(1 << 40), mapped, ctypes.c_uint32(9))
    launch(cuda.load("scale", SYMBOL, "sm_80"), *arguments, shared=1000)
    numbers, parameters, stream = launched(stub)
    assert numbers[:8] == [5, 4, 3, 64, 2, 1, 1000, 0] and numbers[8:11] == [0, 0, 0] and stream == 0x700
    expected = struct.pack("<Qi4xQf4xq24x128sI", x.data_ptr(), -7, 0, 0.5, 1 << 40, bytes(mapped), 9)
    assert parameters == expected
    assert expected.index(bytes(range(128))) % 64 == 0


def test_a_later_launch_packs_its_own_values(stub):
    kernel = cuda.load("scale", SYMBOL, "sm_80")
    for value in (1, 2):
        x = torch.zeros(value)
        launch(kernel, x, ctypes.c_int32(value))
        assert launched(stub)[1] == struct.pack("<Qi", x.data_ptr(), value)
    launch(kernel, None, ctypes.c_int32(3))
    assert launched(stub)[1] == struct.pack("<Qi", 0, 3)
    assert number(stub, "stub_loads") == 1


def test_shared_memory_is_asked_for_once_and_again_only_for_more(stub):
    kernel = cuda.load("scale", SYMBOL, "sm_80")
    for shared, asked in ((0, 0), (100_000, 1), (100_000, 1), (50_000, 1), (200_000, 2), (100_000, 2)):
        launch(kernel, torch.zeros(1), shared=shared)
        assert (number(stub, "stub_attributes"), launched(stub)[0][6]) == (asked, shared)
    with pytest.raises(driver.DriverError, match="233000 bytes of shared memory: stub's words"):
        launch(kernel, torch.zeros(1), shared=233_000)


def test_clusters(stub):
    kernel = cuda.load("scale", SYMBOL, "sm_90a")
    for cluster in ((2, 1, 1), (1, 1, 1), (1, 2, 1), (2, 1, 1)):
        told = [0, 0, 0] if cluster == (1, 1, 1) else cluster
        launch(kernel, torch.zeros(1), cluster=cluster, shared=500)
        numbers, _, stream = launched(stub)
        assert numbers[:11] == [5, 4, 3, 64, 2, 1, 500, 0, *told] and stream == 0x700


def test_every_device_has_its_own_module_function_and_shared_memory(stub):
    kernel = cuda.load("scale", SYMBOL, "sm_80")
    for index in (0, 1, 0):
        stub.cuCtxSetCurrent(None)
        launch(kernel, torch.zeros(1), shared=100_000, device=torch.device("cuda", index))
        numbers, _, stream = launched(stub)
        assert numbers[7] == index and stream == 0x700 + index
    assert number(stub, "stub_loads") == 2 and number(stub, "stub_attributes") == 2


def test_a_thread_that_torch_has_not_used_the_gpu_in_launches_too(stub):
    kernel = cuda.load("scale", SYMBOL, "sm_80")
    launch(kernel, torch.zeros(1))
    failures = []

    def run():
        try:
            launch(kernel, torch.zeros(2))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


def test_loading_leaves_the_current_context_as_it_was(stub):
    other = ctypes.c_void_p()
    stub.cuDevicePrimaryCtxRetain(ctypes.byref(other), 1)
    stub.cuCtxSetCurrent(other)
    driver.load_module(b"\x7fELF\0", 0)
    now = ctypes.c_void_p()
    stub.cuCtxGetCurrent(ctypes.byref(now))
    assert now.value == other.value


def test_a_first_launch_may_stand_in_a_capture(stub):
    ctypes.c_int.in_dll(stub, "stub_capturing").value = 1
    launch(cuda.load("scale", SYMBOL, "sm_80"), torch.zeros(1))
    mode = ctypes.c_int(0)
    stub.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0, "the thread's mode of capture is what it was"


def test_the_driver_s_words(stub, monkeypatch):
    with pytest.raises(driver.DriverError, match=r"cuModuleGetFunction other_scale: named symbol not found \(500\)"):
        launch(cuda.load("scale", "other_scale", "sm_80"), torch.zeros(1))
    cuda._module.cache_clear()
    monkeypatch.setattr(images, "find", lambda name, target: images.Image(b"wrong", "sm_80.cubin", "shipped"))
    with pytest.raises(
        driver.DriverError, match=r"scale: the driver refuses the shipped sm_80\.cubin: .*words \(200\)"
    ):
        launch(cuda.load("scale", SYMBOL, "sm_80"), torch.zeros(1))


def test_a_launch_within_another_has_memory_of_its_own(stub):
    """As one by another thread, or by what runs when an object is collected."""
    kernel = cuda.load("scale", SYMBOL, "sm_80")

    class Launching:
        def __index__(self):
            kernel.launch((9, 9, 9), (32, 1, 1), (y, ctypes.c_int32(1), ctypes.c_int32(2)), device=place, shared=7)
            inner.append(launched(stub))
            return 5

    class Number(ctypes.c_int32):
        value = Launching()

    x, y, place, inner = torch.zeros(1), torch.zeros(2), torch.device("cuda", 0), []
    for _ in range(2):
        launch(kernel, x, ctypes.c_int32(3), ctypes.c_int32(4))
        launch(kernel, x, ctypes.c_int32(3), Number())
        numbers, parameters, _ = launched(stub)
        assert numbers[:7] == [5, 4, 3, 64, 2, 1, 0] and parameters == struct.pack("<Qii", x.data_ptr(), 3, 5)
        assert inner[-1][0][:7] == [9, 9, 9, 32, 1, 1, 7]
        assert inner[-1][1] == struct.pack("<Qii", y.data_ptr(), 1, 2)


def test_arguments_that_a_kernel_cannot_take(stub):
    kernel = cuda.load("scale", SYMBOL, "sm_80")
    for wrong in (1, 1.0, "x", ctypes.c_int8(1)):
        with pytest.raises(TypeError, match="scale: arguments of fusedops_scale must be tensors, None, ctypes"):
            launch(kernel, torch.zeros(1), wrong)
    launch(kernel, torch.zeros(1))
    with pytest.raises(ValueError, match="fusedops_scale must be launched with the types of its first launch"):
        launch(kernel, torch.zeros(1), torch.zeros(1))


def test_tensor_maps_of_the_driver(stub):
    matrix = torch.zeros(40, 64, dtype=torch.bfloat16)[:, :48]
    mapped = cuda.tensor_map(matrix, (8, 16), swizzle=64)
    assert isinstance(mapped, cuda.TensorMap) and len(mapped) == 128
    said = struct.unpack_from("<10Q", mapped)
    assert said == (9, matrix.data_ptr(), 48, 40, 128, 16, 8, 11, 2, 0)
    assert cuda.tensor_map(matrix, (8, 16), swizzle=64) == mapped and number(stub, "stub_encodes") == 1
    assert struct.unpack_from("<10Q", cuda.tensor_map(matrix[1:], (8, 16)))[1] == matrix.data_ptr() + 128
    assert len(cuda.tensor_map(matrix.to("meta"), (8, 16))) == 128 and number(stub, "stub_encodes") == 2


def test_why_kernels_cannot_run(monkeypatch, tmp_path):
    assert cuda.rejection(torch.device("cpu")) == "CUDA kernels run on CUDA tensors, got cpu"
    forget()
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    monkeypatch.setattr(cuda, "limits", lambda place: device.TARGETS["sm_75"])
    assert "needs compute capability 8.0" in cuda.rejection(torch.device("cuda", 0))
    monkeypatch.setattr(cuda, "limits", lambda place: device.TARGETS["sm_90a"])
    assert "no NVIDIA driver" in cuda.rejection(torch.device("cuda", 0))
    assert cuda.target(torch.device("cuda", 0)) == "sm_90a"

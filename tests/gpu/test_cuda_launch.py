"""The loader of CUDA kernels on a real driver: streams, threads, graphs, devices, and arrays of CuPy.

The kernel is PTX that the driver compiles, so no compiler is needed.
"""

import ctypes
import threading

import pytest
import torch

from fusedops import interop
from fusedops._core import cuda
from fusedops._core.cuda import driver, images
from tests.core.test_cuda_emulated import PTX
from tests.gpu.common import needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(images, "find", lambda name, target: images.Image(PTX.encode(), "sm_80.ptx", "of this test"))
    cuda._module.cache_clear()
    yield cuda.Kernel("add", "fusedops_add", "sm_80")
    cuda._module.cache_clear()


def add(kernel, x, value, **options):
    out = torch.empty_like(x)
    grid = (-(-x.numel() // 256), 1, 1)
    kernel.launch(grid, (256, 1, 1), [x, out, ctypes.c_int32(x.numel()), ctypes.c_float(value)], **options)
    return out


def test_it_launches_on_the_current_stream(kernel):
    assert cuda.rejection(torch.device("cuda")) is None
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(1 << 20, device="cuda")
        for _ in range(50):
            x = add(kernel, x, 1.0)
    stream.synchronize()
    assert torch.equal(x, torch.full_like(x, 50.0))


def test_it_launches_in_a_fresh_thread_with_much_shared_memory(kernel):
    x, found = torch.arange(1000.0, device="cuda"), []
    torch.cuda.synchronize()

    def run():
        out = torch.empty_like(x)
        arguments = [x, out, ctypes.c_int32(1000), ctypes.c_float(3.0)]
        kernel.launch((4, 1, 1), (256, 1, 1), arguments, shared=90 * 1024)
        found.append(out)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(found[0], x + 3)


def test_a_first_launch_and_later_ones_are_captured(kernel):
    x = torch.ones(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = add(kernel, add(kernel, x, 1.0), 2.0)
    x.fill_(10)
    graph.replay()
    assert torch.equal(out, torch.full_like(out, 13.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_device_is_served(kernel):
    for index in (1, 0, 1):
        with torch.cuda.device(index):
            x = torch.zeros(1000, device=f"cuda:{index}")
            assert torch.equal(add(kernel, x, 4.0), x + 4)


def test_the_driver_encodes_tensor_maps_and_refuses_what_is_no_matrix():
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor maps need Hopper")
    matrix = torch.zeros(64, 128, dtype=torch.bfloat16, device="cuda")
    assert len(set(cuda.tensor_map(matrix, (64, 64), swizzle=128))) > 1
    with pytest.raises(driver.DriverError, match="cuTensorMapEncodeTiled"):
        cuda.tensor_map(matrix[:, 1:], (64, 64), swizzle=128)


def test_cupy_arrays_on_their_current_stream():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.arange(8 * 4096, dtype=cupy.float32).reshape(8, 4096)
        weight = cupy.ones(4096, dtype=cupy.float32)
        out = interop.rms_norm(x * 2, weight)
        again = out + 0
    stream.synchronize()
    assert isinstance(out, cupy.ndarray) and cupy.array_equal(out, again)
    expected = torch.nn.functional.rms_norm(torch.from_dlpack(x * 2), (4096,), torch.from_dlpack(weight), 1e-6)
    torch.testing.assert_close(torch.from_dlpack(out), expected)

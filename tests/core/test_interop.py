"""Arrays of other libraries through every operator: their memory goes in, results are of the caller's library.

NumPy's arrays stand for CuPy's where memory and types matter. Where streams do, a library of one class records what is
asked of it, and torch's own calls are replaced: no GPU is needed.
"""

import contextlib
import sys
import types

import numpy as np
import pytest
import torch

import fusedops
from fusedops import interop
from fusedops.cli.explain import example_call

X = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
W = np.random.default_rng(1).standard_normal(64, dtype=np.float32)


def test_results_are_arrays_with_the_operator_s_values():
    out = interop.rms_norm(X, W, eps=1e-5)
    assert type(out) is np.ndarray and out.dtype == np.float32
    expected = fusedops.rms_norm(torch.from_numpy(X), torch.from_numpy(W), eps=1e-5)
    assert np.array_equal(out, expected.numpy())


def test_nothing_is_copied_on_the_way(monkeypatch):
    seen = []

    def operator(x, *, others):
        seen.extend([x, *others])
        return x[1:], [others[0], 3]

    x, w = X.copy(), W.copy()
    kept = torch.zeros(2)
    rows, (same, number) = interop.wrap(operator)(x, others=(w, kept))
    assert seen[0].data_ptr() == x.ctypes.data and seen[1].data_ptr() == w.ctypes.data and seen[2] is kept
    assert np.shares_memory(rows, x) and rows.ctypes.data == x[1:].ctypes.data
    assert same.ctypes.data == w.ctypes.data and number == 3


def test_operators_in_place_change_the_array():
    x, residual = X.copy(), np.ones_like(X)
    interop.add_rms_norm_(x, residual, W)
    expected = [torch.from_numpy(X.copy()), torch.ones(5, 64)]
    fusedops.add_rms_norm_(*expected, torch.from_numpy(W))
    assert np.array_equal(x, expected[0].numpy()) and np.array_equal(residual, expected[1].numpy())


def as_arrays(value):
    """Tensors that NumPy can hold as arrays; others stay."""
    if isinstance(value, torch.Tensor) and value.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return value.detach().numpy()
    return value


@pytest.mark.parametrize("name", fusedops.OPERATORS)
def test_every_operator_takes_arrays(name):
    positional, named = example_call(name, (1, 3, 2, 64), torch.float32, torch.device("cpu"))
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in positional]
    expected = getattr(fusedops, name)(*copies, **named)
    arguments = [as_arrays(value) for value in positional]
    assert any(isinstance(value, np.ndarray) for value in arguments)
    tensors = expected if isinstance(expected, tuple) else (expected,)
    low = [one for one in tensors if isinstance(one, torch.Tensor) and as_arrays(one) is one]
    call = getattr(interop, name)
    if low:
        with pytest.raises(TypeError, match=rf"{name}: numpy has no arrays of {low[0].dtype}"):
            call(*arguments, **{key: as_arrays(value) for key, value in named.items()})
        return
    found = call(*arguments, **{key: as_arrays(value) for key, value in named.items()})
    found = found if isinstance(found, tuple) else (found,)
    for one, tensor in zip(found, tensors, strict=True):
        if isinstance(tensor, torch.Tensor):
            assert isinstance(one, np.ndarray) and np.array_equal(one, tensor.numpy(), equal_nan=True)


def test_tensors_alone_stay_tensors():
    assert isinstance(interop.rms_norm(torch.from_numpy(X), torch.from_numpy(W)), torch.Tensor)


def test_names():
    assert set(fusedops.OPERATORS) <= set(dir(interop)) and interop.rms_norm.__doc__ == fusedops.rms_norm.__doc__
    assert interop.rms_norm is interop.rms_norm
    with pytest.raises(AttributeError, match="interop: name must be one of .*rms_norm.*, got 'soft_max'"):
        interop.soft_max  # noqa: B018 - the access is what fails


class Recorded:
    """Arrays of a library that lives on a GPU in name: its memory is the CPU's, its streams are numbers."""

    def __init__(self, tensor, device=(2, 0)):
        self.tensor, self.device = tensor, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__()


@pytest.fixture
def library(monkeypatch):
    """Events in order: what became torch's current stream and when, and what was exchanged then."""
    events = []
    module = types.ModuleType("recorded")
    module.from_dlpack = lambda tensor: events.append("back") or Recorded(tensor)
    module.cuda = types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=module.stream))
    module.stream, module.events = 0x5000, events
    monkeypatch.setitem(sys.modules, "recorded", module)
    monkeypatch.setattr(Recorded, "__module__", "recorded._deep.inside")

    @contextlib.contextmanager
    def noted(what):
        events.append(f"begin {what}")
        yield
        events.append("end")

    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: f"stream {ptr:#x} of {device}")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    monkeypatch.setattr(torch.cuda, "stream", noted)
    monkeypatch.setattr(torch.cuda, "device", lambda index: noted(f"device {index}"))
    monkeypatch.setattr(torch, "from_dlpack", lambda array: events.append("in") or array.tensor)
    return module


def negate(x, y=None):
    sys.modules["recorded"].events.append("run")
    return -x


def test_everything_happens_on_the_library_s_current_stream(library):
    x = Recorded(torch.ones(3), (2, 1))
    out = interop.wrap(negate)(x, y=x)
    assert isinstance(out, Recorded) and torch.equal(out.tensor, -torch.ones(3))
    assert library.events == ["begin stream 0x5000 of 1", "in", "in", "run", "back", "end"]


def test_the_default_stream(library):
    library.stream = 0
    interop.wrap(negate)(Recorded(torch.ones(3), (2, 1)))
    assert library.events == ["begin device 1", "begin default of 1", "in", "run", "back", "end", "end"]


def test_on_the_cpu_there_is_no_stream(library):
    interop.wrap(negate)(Recorded(torch.ones(3), (1, 0)))
    assert library.events == ["in", "run", "back"]


def test_what_does_not_fit_is_refused(library):
    with pytest.raises(TypeError, match="negate: arrays must be of one library, got numpy and recorded"):
        interop.wrap(negate)(X, Recorded(torch.ones(3)))
    with pytest.raises(ValueError, match=r"negate: arrays must lie on one device, got \[\(2, 0\), \(2, 1\)\]"):
        interop.wrap(negate)(Recorded(torch.ones(3)), Recorded(torch.ones(3), (2, 1)))
    del library.from_dlpack
    with pytest.raises(TypeError, match="negate: the library of arrays must have from_dlpack, got recorded"):
        interop.wrap(negate)(Recorded(torch.ones(3)))
    assert library.events == []

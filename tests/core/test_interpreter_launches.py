"""What the repaired interpreter does once a launch: triton.language is changed for it, and is itself again after it."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from fusedops.testing import interpreter


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _repeat_kernel(x_ptr, TIMES: tl.constexpr):
    x = tl.load(x_ptr)
    for _ in tl.static_range(TIMES):
        x = _twice(x)
    tl.static_assert(TIMES < 9, "too many")
    tl.store(x_ptr, tl.sum(tl.full((4,), 1.0, tl.float32), 0) * x)


def launch(times):
    x = torch.tensor([3.0])
    _repeat_kernel[(1,)](x, TIMES=times)
    return x.item()


@pytest.fixture
def scans(monkeypatch):
    """Packages of triton.language that were looked through for functions to change."""
    seen = []
    original = triton_interpreter._patch_builtin
    monkeypatch.setattr(triton_interpreter, "_patch_builtin", lambda *args: (seen.append(args[0]), original(*args)))
    return seen


def test_calls_of_jitted_functions_do_not_look_through_the_language_again(scans):
    def scans_of(times):
        scans.clear()
        assert launch(times) == 12.0 * 2**times
        return len(scans)

    scans_of(1)  # the first launch rewrites functions, which may change what they see of the language
    assert scans_of(8) == scans_of(1) > 0
    interpreter.uninstall()
    try:
        assert scans_of(8) > scans_of(1)
    finally:
        interpreter.install()


def test_the_language_is_itself_again_after_a_launch_and_after_a_failure():
    before = {name: getattr(tl, name) for name in ("load", "program_id", "range", "multiple_of")}
    launch(2)
    assert all(getattr(tl, name) is value for name, value in before.items())
    with pytest.raises(triton_interpreter.InterpreterError, match="too many"):
        launch(9)
    assert all(getattr(tl, name) is value for name, value in before.items())
    assert launch(2) == 48.0

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


@pytest.mark.parametrize("element", [tl.float32, tl.pointer_type(tl.int8)])
def test_a_shape_that_was_seen_is_described_as_the_first_time(element):
    first = tl.block_type(element, [8, tl.constexpr(2)])
    again = tl.block_type(element, first.shape)
    assert again == first == tl.block_type(element, [8, 2])
    assert str(again) == str(first) == f"<{first.shape}, {element}>"
    assert again.shape is first.shape and again.numel == 16 and again.element_ty is element
    assert tl.block_type(element, [2, 8]) != first != tl.block_type(tl.float16, [8, 2])
    tensors = [tl.tensor(None, kind) for kind in (first, again, element)]
    assert [tensor.numel.value for tensor in tensors] == [16, 16, 1] and tensors[2].shape == ()
    assert all(tensor.shape == (8, 2) and tensor.dtype is element for tensor in tensors[:2])
    for size in (8.0, 3):  # equal to one that was seen, and never right
        with pytest.raises((TypeError, ValueError), match="Shape element 0 must"):
            tl.block_type(element, [size, 2])

"""Calls that are recognised as the last ones are those ones: nothing that could change what they run is overlooked."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedops
from fusedops import batch_invariant, counters
from fusedops._core import env, recent, replay
from fusedops._core.recent import PLACES, Recent, recognising
from fusedops._core.register import operators
from fusedops._core.source import GIVEN, Source

X, W = torch.randn(4, 8), torch.randn(8)
ARGS = X, W, 1e-6, 0.0, "once"
RMS = operators()["rms_norm"]


def kinds(operator=RMS, first=False):
    """How many kinds of calls are recognised now."""
    return len(operator._recent[first]._names["functions"])


@pytest.fixture
def known():
    """rms_norm, which recognises calls like ARGS and must not ask its dictionary about them."""
    env.refresh()
    with torch.no_grad():
        fusedops.rms_norm(X, W)
        fusedops.rms_norm(X, W)
    assert kinds() == 1
    return RMS


def recognised(*args):
    """What the function that recognises ARGS gives for other arguments; None where it does not."""
    (function,) = RMS._recent[False]._names["functions"]
    return function(*args)


def test_this_release_of_torch_has_what_calls_are_recognised_by():
    assert recent._GUARDS is not None and recent._num_modes is not None and replay._ALLOCATORS["cpu"] is not None


def test_equal_calls_are_recognised_and_counted(known, monkeypatch):
    monkeypatch.setattr(known, "_recall", None)
    expected = torch.nn.functional.rms_norm(X + 1, (8,), W, ARGS[2])
    torch.testing.assert_close(fusedops.rms_norm(X + 1, W), expected)
    assert counters() == {("rms_norm", "torch"): 3}


class Other(torch.Tensor):
    pass


DIFFERENT = {
    "dtype": (X.half(), W), "shape": (X[:3], W), "strides": (torch.randn(8, 4).T, W), "device": (X.to("meta"), W),
    "class": (X.as_subclass(Other), W), "parameter": (X, torch.nn.Parameter(W)), "no tensor": ([1.0], W),
    "none": (X, None), "gradient": (X.clone().requires_grad_(), W), "eps": (*ARGS[:2], 1e-5, *ARGS[3:]),
    "a tensor for a number": (*ARGS[:2], torch.tensor(1e-6, dtype=torch.float64), *ARGS[3:]),
    "many numbers": (*ARGS[:2], torch.tensor([1e-6, 1.0]), *ARGS[3:]), "type": (*ARGS[:3], 0, "once"),
    "text": (*ARGS[:4], "llama"), "sparse": (X.to_sparse(), W), "conjugate": (torch.complex(X, X).conj(), W),
    "twice": (W, W),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_not_recognised(known, name):
    args = (*DIFFERENT[name], *ARGS[len(DIFFERENT[name]) :])
    assert recognised(*ARGS) is not None and recognised(*args) is None


def modes():
    """name -> function that makes a context in which the operator must be seen, or selection may differ."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    yield "dispatch mode", Watching
    yield "fake tensors", FakeTensorMode
    yield "autocast", lambda: torch.autocast("cpu", torch.bfloat16)
    yield "inference mode", torch.inference_mode


@pytest.mark.parametrize("name, context", list(modes()), ids=lambda value: value if isinstance(value, str) else "")
def test_modes_are_noticed(known, name, context):
    with context():
        assert recognised(*ARGS) is None
    assert recognised(*ARGS) is not None


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_traces_are_noticed(known, tracing):
    """Of the operator itself, and of others that are made while the kept tensors are outside."""
    seen = []

    def function(x, weight):
        seen.append(recognised(*ARGS))
        return fusedops.rms_norm(x, weight)

    with torch.no_grad():
        traced = make_fx(function, tracing_mode=tracing)(X, W)
    assert seen == [None] and "fusedops.rms_norm" in traced.code


@pytest.mark.parametrize(
    "transform", [torch.func.functionalize, torch.func.vmap, lambda f: torch.jit.trace(f, X, check_trace=False)]
)
def test_transforms_are_noticed(known, transform):
    seen = []

    def function(x):
        seen.append(recognised(x, *ARGS[1:]))
        return x + 1

    transform(function)(X)
    assert seen and set(seen) == {None}


def test_recorded_gradients_are_noticed():
    """Where parameters are known without gradients, and the same ones come again with them."""
    env.refresh()
    weight = torch.nn.Parameter(W)
    with torch.no_grad():
        for _ in range(3):
            assert not fusedops.rms_norm(X, weight).requires_grad
    assert kinds() == 1 and recognised(X, weight, *ARGS[2:]) is None
    fusedops.rms_norm(X, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert recognised(X, weight, *ARGS[2:]) is not None


def test_function_modes_see_what_torch_runs(known):
    """As without recognition: the composition is torch's, whose operators they see."""

    class Watching(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            type(self).seen += 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watching():
        fusedops.rms_norm(X, W)
    assert Watching.seen


CHANGES = {
    "backend": lambda: env.override("FUSEDOPS_BACKEND", "reference"),
    "validation": lambda: env.override("FUSEDOPS_VALIDATE", "2"),
    "invariance": batch_invariant,
    "a trial": replay.held,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_what_is_selected_forget(known, name):
    with CHANGES[name]():
        assert kinds() == 0
        assert known._plans == {}
        fusedops.rms_norm(X, W)
        fusedops.rms_norm(X, W)
        assert kinds() == (name == "a trial")
    assert kinds() == 0


def test_what_was_selected_before_a_change_is_not_kept(monkeypatch):
    """Another thread changes the environment between selection and the keeping of what was selected."""
    env.refresh()
    original = RMS._selector.select

    def interrupted(*args):
        selected = original(*args)
        thread = threading.Thread(target=env.changed)
        thread.start()
        thread.join()
        return selected

    monkeypatch.setattr(RMS._selector, "select", interrupted)
    fusedops.rms_norm(X, W)
    assert RMS._plans == {}


def test_what_is_forgotten_while_it_is_kept_does_not_come_back():
    """`clear` waits for a `keep` that has found its plan valid, and so forgets what that one keeps."""
    places = Recent(1, lambda args: None)
    forgetting = threading.Thread(target=places.clear)

    def is_valid():
        forgetting.start()
        forgetting.join(0.05)
        return True

    places.keep(lambda a0: a0, is_valid)
    forgetting.join()
    assert places.call(1) is None
    places.keep(lambda a0: a0, lambda: False)
    assert places.call(1) is None


def test_a_plan_that_was_forgotten_meanwhile_is_not_kept(known, monkeypatch):
    known._recent[False].clear()
    kept = []
    monkeypatch.setattr(known._recent[False], "keep", lambda function, is_valid: kept.append(is_valid))
    with torch.no_grad():
        fusedops.rms_norm(X, W)
    assert kept[0]()
    known._forget()
    assert not kept[0]()


def test_more_kinds_than_places():
    env.refresh()
    inputs = [torch.randn(rows, 8) for rows in range(1, PLACES + 4)]
    with torch.no_grad():
        for _ in range(50):
            for x in inputs:
                assert fusedops.rms_norm(x, W).shape == x.shape
                assert kinds() <= PLACES
    assert kinds() == PLACES and counters()["rms_norm", "torch"] == 50 * len(inputs)


def test_kinds_that_alternate_do_not_throw_each_other_out():
    """One of 16 calls beyond the places takes one; a new kind takes one at once, and nothing is made twice."""
    places, kept = Recent(1, lambda args: None), []
    for number in range(PLACES):
        assert places.wants(is_new=False)
        places.keep(lambda a0, number=number: None, lambda: True)
    for _ in range(64):
        kept.append(places.wants(is_new=False))
    assert sum(kept) == 4 and places.wants(is_new=True)


def test_a_kind_that_is_not_recognised_for_now_takes_no_second_place(known):
    """Below autograd a tensor's dispatch keys are others; the dictionary knows the call, and its function is kept."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        for _ in range(40):
            fusedops.rms_norm(X, W)
    assert kinds() == 1


def test_without_torchs_guards_the_dictionary_is_asked(monkeypatch):
    for name in ("_GUARDS", "_num_modes"):
        with monkeypatch.context() as patched:
            patched.setattr(recent, name, None)
            env.refresh()
            expected = fusedops.rms_norm(X, W)
            assert torch.equal(fusedops.rms_norm(X, W), expected) and kinds() == 0
    env.refresh()
    q = torch.randn(1, 3, 2, 16)
    for _ in range(3):  # torch's guards want each tensor to be another one
        out = fusedops.attention(q, q, q)
    assert kinds(operators()["attention"], True) == 0 and out.shape == q.shape


def test_values_that_can_change_are_not_kept():
    """A list of window sizes may hold other numbers the next time; numbers in a pair are compared with their types."""
    env.refresh()
    q, k, v = (torch.randn(1, 9, 2, 16) for _ in "qkv")
    window = [2, 0]
    with torch.no_grad():
        narrow = [fusedops.attention(q, k, v, window_size=window) for _ in range(3)][-1]
        window[0] = 8
        wide = fusedops.attention(q, k, v, window_size=window)
        assert kinds(operators()["attention"], True) == 0
        assert torch.equal(wide, fusedops.attention(q, k, v, window_size=(8, 0))) and not torch.equal(wide, narrow)
        for _ in range(3):
            fusedops.attention(q, k, v, window_size=(2, 0))
        function = operators()["attention"]._recent[True]._names["functions"][0]
        given = q, k, v, *[None] * 7, False
        assert function(*given, tuple(map(int, "20")), 0.0) is not None
        for other in ((3, 0), (2.0, 0), (2, False), [2, 0], (torch.tensor([2, 3]), 0), None, 2):
            assert function(*given, other, 0.0) is None


def test_first_results_are_those_of_the_whole_call():
    env.refresh()
    q, k, v = (torch.randn(1, 9, 2, 16) for _ in "qkv")
    with torch.no_grad():
        for _ in range(4):
            out, lse = fusedops.attention(q, k, v, causal=True, return_lse=True)
            assert torch.equal(fusedops.attention(q, k, v, causal=True), out) and lse.shape == (1, 2, 9)
    attention = operators()["attention"]
    assert kinds(attention, True) == kinds(attention, False) == 1


def test_calls_of_another_current_device_are_not_recognised(monkeypatch):
    current = [1]
    monkeypatch.setattr(recent, "_current_device", lambda: lambda: current[0])
    function = recognising(Source(1, [f"    return {GIVEN}"], {}), (X,), [0], 1)
    assert function(X) is X
    current[0] = 0
    assert function(X) is None


def test_compiled_code_is_not_made_again_for_calls_outside_of_it():
    """What is recognised changes with eager calls; a compiled one must not look at it."""
    env.refresh()
    made = []
    compiled = torch.compile(
        lambda x: fusedops.rms_norm(x, W), backend=lambda g, _: made.append(g) or g, fullgraph=True
    )
    with torch.no_grad():
        for rows in (1, 2, 3):
            for _ in range(3):
                fusedops.rms_norm(torch.randn(rows, 8), W)
            torch.testing.assert_close(compiled(X), fusedops.rms_norm(X, W))
    assert len(made) == 1
    torch._dynamo.reset()

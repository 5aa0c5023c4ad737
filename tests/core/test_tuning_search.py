"""`fusedops.tune`: the fastest of the right configurations wins, nothing else measures, and nothing is damaged."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

import fusedops
from fusedops._core import env, tuning
from fusedops._core.device import INTERPRETER
from fusedops._core.register import operators
from fusedops._core.relaunch import Relauncher
from fusedops._core.tuning import store
from fusedops.ops.rms_norm import reference
from fusedops.testing import assert_accurate, make_tensor
from fusedops.tuning import Options, measure
from fusedops.tuning.measure import first_of_the_fastest
from fusedops.tuning.oracle import cloned
from tests.core.tuning_problems import ASKED, TOY, Clock, Tile, Time, entry_of

N = 256
DEFAULT, WINNER = "block_m=4 num_warps=2", "block_m=2 num_warps=1"
LAST, NUM_CANDIDATES = "block_m=8 num_warps=8", 5


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Kernels in the interpreter, a user's folder of one test, and no deterministic mode, in which nothing measures."""
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FUSEDOPS_BACKEND", "triton")
    monkeypatch.delenv("FUSEDOPS_CACHE_PATH", raising=False)
    start_again()
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(kernels().FORWARD, "space", {"block_m": (1, 2, 8), "num_warps": (1, 8)})
    monkeypatch.setattr(measure, "BATCH", 2)
    yield
    assert not tuning._aside
    store.forget_memory()
    env.refresh()


def start_again():
    """As a new process would."""
    store.forget_memory()
    env.refresh()


def kernels():
    return operators()["rms_norm"].module("triton")


def arguments(dtype=torch.float16):
    return make_tensor((5, N), dtype, seed=1), make_tensor((N,), dtype, seed=2)


def told(fast, default=1.0, other=1.5):
    """A clock by which one configuration is fast."""
    return Clock(lambda name: {WINNER: fast, DEFAULT: default}.get(name, other))


def tuned(timer, *, op="rms_norm", args=None, **options):
    report = fusedops.tune(op, *(args or arguments()), tuning=Options(timer=timer, **options))
    assert report.reason is None
    (one,) = report.tuned
    return one


def used(op="rms_norm", args=None):
    """(configuration as text, source) of the next call."""
    explanation = fusedops.explain(op, *(args or arguments()))
    return explanation.config, explanation.config_source


class Watched:
    """A kernel that is launched as it is or otherwise, and what it was launched with."""

    def __init__(self, kernel, launch=None):
        self.kernel = kernel
        self.arg_names = kernel.arg_names
        self.launch = launch
        self.launches = []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.launches.append((grid, options))
            if self.launch is None:
                return self.kernel[grid](*args, **options)
            return self.launch(self.kernel, grid, args, options)

        return run


@contextlib.contextmanager
def launching(monkeypatch, launch=None):
    """Launch the norm's kernel through `launch(kernel, grid, args, options)`."""
    with monkeypatch.context() as patch:
        watched = Watched(kernels()._rms_norm_kernel, launch)
        patch.setattr(kernels(), "_run", Relauncher(watched))
        yield watched


def test_the_fastest_wins_is_kept_and_used():
    clock = told(0.5)
    one = tuned(clock)
    assert (one.state, measure.label(one.before.tunable, one.config)) == ("measured", WINNER)
    assert len(one.timings) == NUM_CANDIDATES and next(iter(one.timings)) == DEFAULT and not one.refused
    assert used() == ("RowConfig(block_m=2, block_n=256, num_warps=1)", "memory")
    start_again()
    assert used() == ("RowConfig(block_m=2, block_n=256, num_warps=1)", "user")
    again = tuned(Clock(lambda name: pytest.fail("measured what is known")))
    assert again.state == "known" and again.config == one.config
    assert tuned(told(2.0), force=True).config == one.before.config


def test_a_call_that_was_made_before_uses_it_too(monkeypatch):
    with launching(monkeypatch) as watched:
        fusedops.rms_norm(*arguments())
        tuned(told(0.5))
        fusedops.rms_norm(*arguments())
    assert [options["BLOCK_M"] for _, options in (watched.launches[0], watched.launches[-1])] == [4, 2]


def test_what_is_not_to_be_kept_holds_for_this_process():
    tuned(told(0.5), keep=False)
    assert used()[1] == "memory"
    start_again()
    assert used()[1] == tuning.DEFAULT


@pytest.mark.parametrize(
    ("fast", "default", "wins"),
    [(0.979, 1.0, True), (0.981, 1.0, False), (1.0, 1.0, False), (0.9, Time(1.0, 0.8), False),
     (0.7, Time(1.0, 0.8), True), (Time(0.9, 0.7), 1.0, False)],
)  # fmt: skip
def test_a_winner_must_be_faster_by_more_than_the_noise(fast, default, wins):
    one = tuned(told(fast, default))
    assert (measure.label(one.before.tunable, one.config) == WINNER) == wins
    assert (one.entry.noise > 0) == (isinstance(fast, Time) or isinstance(default, Time))


def test_of_equals_the_first_wins():
    assert first_of_the_fastest({"a": 1.03, "b": 1.0, "c": 0.99}, 0.02) == "b"
    assert first_of_the_fastest({"a": 1.009, "b": 1.0, "c": 0.99}, 0.02) == "a"
    one = tuned(Clock(lambda name: 1.0 if name == DEFAULT else 0.5))
    assert measure.label(one.before.tunable, one.config) == "block_m=1 num_warps=1"


def test_a_slower_hour_does_not_decide(monkeypatch):
    """Batches are compared by the default that is timed in each, so that a machine that slows down slows both."""
    monkeypatch.setattr(measure, "FINALISTS", 1)
    hours = iter([1.0, 9.0, 9.0])

    class Slowing(Clock):
        def __call__(self, calls, arguments, device):
            hour = next(hours)
            self.seconds = lambda name: hour * {LAST: 0.4}.get(name, 1.0)
            return super().__call__(calls, arguments, device)

    one = tuned(Slowing(None))
    assert measure.label(one.before.tunable, one.config) == LAST
    assert one.timings[LAST] < one.timings[DEFAULT]


def test_known_bug_b49_what_is_in_place_works_on_clones():
    """triton-lang/triton#6547, #781, #54, #4217: tuning an in-place kernel corrupts data in the first call."""
    x, weight = arguments()
    residual = make_tensor((5, N), torch.float16, seed=3)
    given, before = (x, residual, weight), [t.clone() for t in (x, residual, weight)]
    one = tuned(told(0.5), op="add_rms_norm_", args=given)
    assert len(one.timings) == NUM_CANDIDATES and not one.refused
    assert all(torch.equal(t, was) for t, was in zip(given, before))
    results = []
    for _ in range(2):
        first, second = x.clone(), residual.clone()
        fusedops.add_rms_norm_(first, second, weight)
        results.append((first, second))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    truth, h = reference.add_rms_norm(*(t.double() for t in (x, residual, weight)), 1e-6, round_to=x.dtype)
    assert_accurate(results[0][0], truth)
    assert_accurate(results[0][1], h)


def test_clones_keep_layout_alignment_and_identity():
    base = torch.arange(200.0)
    view = base[3:].as_strided((4, 5), (20, 2))
    first, again, number = cloned((view, view, 7))
    assert first is again and number == 7 and first.stride() == view.stride() and torch.equal(first, view)
    assert first.data_ptr() % 16 == view.data_ptr() % 16 and first.data_ptr() != view.data_ptr()
    first.zero_()
    assert torch.equal(base, torch.arange(200.0))
    (empty,) = cloned((torch.empty(3, 0, 2),))
    (expanded,) = cloned((torch.ones(1, 4).expand(3, 4),))
    assert empty.shape == (3, 0, 2) and expanded.stride() == (0, 1)


def half_grid(kernel, grid, args, options):
    """Leaves the last rows as they are."""
    size = grid[0] - 1 if options["BLOCK_M"] == 2 else grid[0]
    return kernel[(size,)](*args, **options)


def scaled(kernel, grid, args, options):
    """One value in a hundred is a little off."""
    kernel[grid](*args, **options)
    if options["BLOCK_M"] == 2:
        args[3].view(-1)[::100] *= 1.05


def restless(kernel, grid, args, options):
    """Within every budget, but another result each time."""
    kernel[grid](*args, **options)
    restless.calls += 1
    if options["BLOCK_M"] == 2 and restless.calls % 2:
        args[3].view(-1)[0] = args[3].view(-1)[0].nextafter(torch.tensor(9.0, dtype=args[3].dtype))


restless.calls = 0


def writing(kernel, grid, args, options):
    """Writes into its input."""
    kernel[grid](*args, **options)
    if options["BLOCK_M"] == 2:
        args[0].view(-1)[0] += 1


def refusing(kernel, grid, args, options):
    """What a driver says to a kernel that wants too much."""
    if options["BLOCK_M"] == 2:
        raise RuntimeError("out of resource: shared memory")
    return kernel[grid](*args, **options)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(half_grid, "NaN at"), (scaled, "epsilons"), (restless, "second call gives other bits"),
     (writing, "argument 0 was written to"), (refusing, "RuntimeError: out of resource")],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_known_bug_b50_what_is_wrong_cannot_win(monkeypatch, fault, reason):
    """triton-lang/triton#9230: many configurations write one output, and what one leaves out another has written."""
    with launching(monkeypatch, fault):
        one = tuned(told(0.1, 1.0))
    assert one.config == one.before.config and len(one.refused) == 1
    assert all("block_m=2" in name and reason in why for name, why in one.refused.items()), one.refused
    assert one.entry.validation["refused"] == 1 and not any("block_m=2" in name for name in one.timings)


def test_a_wrong_default_is_told_and_nothing_is_kept(monkeypatch):
    def wrong(kernel, grid, args, options):
        kernel[grid](*args, **options)
        args[3].mul_(1.5)

    with launching(monkeypatch, wrong):
        one = tuned(told(0.5))
    assert one.state == "failed" and one.entry is None and "epsilons" in str(one)
    assert used()[1] == tuning.DEFAULT


def test_known_bug_b51_cold_and_warm_calls_are_the_same(monkeypatch):
    """triton-lang/triton#7181, IBM/triton-dejavu#1: what ran when tuning did not run when its result was reused."""
    x, weight = arguments()
    tuned(told(0.5))
    results = []
    for state in ("cold", "memory", "disk"):
        if state == "disk":
            start_again()
            assert used()[1] == "user"
        with launching(monkeypatch) as watched:
            results.append((fusedops.rms_norm(x, weight), watched.launches))
    (first, launches), *others = results
    assert launches[0][1]["BLOCK_M"] == 2
    for out, launched in others:
        assert torch.equal(out, first) and launched == launches


def test_a_search_that_runs_out_of_time_goes_on_later(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("fusedops.tuning.time", measure.time)

    class Ticking(Clock):
        def __call__(self, calls, arguments, device):
            now[0] += 10.0
            return super().__call__(calls, arguments, device)

    seconds = told(0.5).seconds
    first = tuned(Ticking(seconds), seconds=5.0)
    assert first.state == "partly measured" and len(first.timings) == 1 + measure.BATCH
    assert used()[1] == "memory"
    clock = Ticking(seconds)
    second = tuned(clock, seconds=1000.0)
    repeated = {name for batch in clock.rounds[:-1] for name in batch} & {*first.timings}
    assert second.state == "measured" and len(second.timings) == NUM_CANDIDATES and repeated == {DEFAULT}
    assert tuned(Clock(lambda name: pytest.fail("measured what is known"))).state == "known"


def test_an_interrupted_search_leaves_nothing_behind():
    def interrupt(text, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(told(0.5), progress=interrupt)
    assert used()[1] == tuning.DEFAULT and not tuning._aside


def test_progress_is_told():
    heard = []
    tuned(told(0.5), progress=lambda *args: heard.append(args))
    assert len(heard) >= NUM_CANDIDATES and all(0 <= done <= total == NUM_CANDIDATES for _, done, total in heard)
    assert heard[0][0] == f"rms_norm {DEFAULT}"


@contextlib.contextmanager
def capturing(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


@contextlib.contextmanager
def deterministic(monkeypatch):
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def batch_invariant(monkeypatch):
    with tuning.defaults_only():
        yield


@pytest.mark.parametrize(
    ("mode", "reason"),
    [(capturing, "a CUDA graph is being captured"), (deterministic, "use_deterministic_algorithms is on"),
     (batch_invariant, "only defaults are used")],
)  # fmt: skip
def test_known_bug_b47_nothing_is_measured_where_it_must_not(monkeypatch, mode, reason):
    """triton-lang/triton#10596: measuring in a capture kills the capture; here the call gets the default."""
    args = arguments()
    with launching(monkeypatch) as watched, mode(monkeypatch):
        report = fusedops.tune("rms_norm", *args, tuning=Options(timer=lambda *rest: pytest.fail("measured")))
        assert reason in report.reason and reason in str(report) and not watched.launches
        assert [one.state for one in report.tuned] == [tuning.DEFAULT]
        fusedops.rms_norm(*args)
        assert len(watched.launches) == 1 and watched.launches[0][1]["BLOCK_M"] == 4


@pytest.mark.parametrize(("mode", "block"), [(capturing, 2), (deterministic, 2), (batch_invariant, 4)])
def test_a_capture_looks_up_and_batch_invariance_does_not(monkeypatch, mode, block):
    tuned(told(0.5))
    start_again()
    with launching(monkeypatch) as watched, mode(monkeypatch):
        fusedops.rms_norm(*arguments())
    assert watched.launches[0][1]["BLOCK_M"] == block


def test_a_call_measures_nothing(monkeypatch):
    monkeypatch.setattr("fusedops.testing.timing.compare", lambda *args, **options: pytest.fail("measured"))
    with launching(monkeypatch) as watched:
        fusedops.rms_norm(*arguments())
    assert len(watched.launches) == 1


def test_other_threads_keep_what_they_use():
    seen = []
    with tuning.forced(TOY, Tile(32, 2)), tuning.observed() as mine:
        thread = threading.Thread(target=lambda: seen.append(TOY.choose(INTERPRETER, *ASKED)))
        thread.start()
        thread.join()
        assert TOY.choose(INTERPRETER, *ASKED) == Tile(32, 2)
    assert seen == [Tile()] and mine == []


def test_the_real_timer_on_a_tiny_call(monkeypatch):
    """The whole way, with time as it passes; which one is fastest in the interpreter is nobody's business."""
    monkeypatch.setattr(kernels().FORWARD, "space", {"block_m": (2, 4), "num_warps": (1,)})
    one = tuned(measure.measure_side_by_side)
    assert one.state == "measured" and all(0 < seconds < 1 for seconds in one.timings.values())
    assert one.entry.noise >= 0 and used()[1] == "memory"


def test_what_has_no_kernel_has_nothing_to_tune():
    with env.override("FUSEDOPS_BACKEND", "torch"):
        report = fusedops.tune("rms_norm", *arguments())
    assert report.reason == "torch has nothing to configure" and not report.tuned


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fusedops.tune("no_such", torch.ones(3)), ValueError, "tune: op must be one of .*, got 'no_such'"),
        (lambda: fusedops.tune("rms_norm", torch.ones(3, 4), torch.ones(5)), ValueError, "rms_norm: weight must"),
        (lambda: fusedops.tune("rms_norm", torch.ones(3, 4, dtype=torch.int8)), TypeError, "rms_norm"),
    ],
)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_explanation_has_key_and_source():
    store.current_store().put(entry_of(), keep=False)
    explanation = fusedops.explain("rms_norm", *arguments(), target="sm_80")
    assert explanation.config_source == tuning.DEFAULT
    assert explanation.config_key["rms_norm"]["n"] == N and "dtype=torch.float16" in str(explanation)

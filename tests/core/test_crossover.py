"""For how many rows sparse is faster: measured, stored and looked up as tuned configurations, followed by layers."""

import json
from dataclasses import dataclass

import pytest
import torch

import fusedops
from fusedops import batch_invariant
from fusedops._core import env
from fusedops._core.tuning import store
from fusedops.cli import main
from fusedops.crossover import longest_run, tune_crossover
from fusedops.nn import Sparse24Linear
from fusedops.ops.sparse_matmul._crossover import CROSSOVER, END, Crossover, is_sparse
from fusedops.tuning import Options

N, K, CPU = 24, 40, torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDOPS_CACHE_DIR", str(tmp_path / "cache"))
    torch.use_deterministic_algorithms(False)
    store.forget_memory()
    env.refresh()
    yield tmp_path / "cache"
    store.forget_memory()
    env.refresh()


@dataclass
class Time:
    median: float
    low: float


class Stopwatch:
    """A timer for which sparse is twice as fast for some numbers of rows, and half as fast for others."""

    def __init__(self, fast, noise=0.0):
        self.fast, self.noise, self.asked = fast, noise, []

    def __call__(self, calls, arguments, device):
        rows = arguments[0][0].shape[0]
        self.asked.append(rows)
        results = {name: call(*arguments[0]) for name, call in calls.items()}
        assert results["sparse"].shape == results["dense"].shape == (rows, N)
        sparse = 1.0 if rows in self.fast else 4.0
        return {"sparse": Time(sparse, sparse * (1 - self.noise)), "dense": Time(2.0, 2.0)}


def measured(fast, dtype=torch.float32, noise=0.0, **options):
    watch = Stopwatch(fast, noise)
    return tune_crossover(N, K, dtype, max_rows=32, tuning=Options(timer=watch, **options)), watch


def answers(dtype=torch.float32, rows=(1, 2, 3, 4, 8, 16, 17, 32, 4096)):
    return [number for number in rows if is_sparse(number, N, K, dtype, CPU)]


@pytest.mark.parametrize(
    ("wins", "expected"),
    [
        ("1111", Crossover(1, END)),
        ("0000", Crossover(END, END)),
        ("0110", Crossover(2, 4)),
        ("0011", Crossover(4, END)),
        ("1000", Crossover(1, 1)),
        ("1011", Crossover(4, END)),
        ("1101", Crossover(1, 2)),
    ],
)
def test_the_longest_run_without_a_gap(wins, expected):
    assert longest_run({2**power: win == "1" for power, win in enumerate(wins)}) == expected


def test_sparse_until_it_is_measured_and_then_between_the_numbers_of_rows():
    assert answers() == [1, 2, 3, 4, 8, 16, 17, 32, 4096]
    found, watch = measured({2, 4, 8})
    assert watch.asked == [1, 2, 4, 8, 16, 32] and found.state == "measured"
    assert answers() == [2, 3, 4, 8] and found.crossover == Crossover(2, 8)
    assert found.timings["sparse 4"] == 1.0 and found.timings["dense 4"] == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_every_dtype_has_its_own_answer(dtype):
    measured({1, 2}, dtype)
    assert answers(dtype) == [1, 2] and len(answers()) == 9


def test_what_noise_hides_is_no_gain():
    assert measured({1, 2, 4, 8, 16, 32}, noise=0.9)[0].crossover == Crossover(1, END)  # 1.9 of 2.0
    assert measured({1, 2, 4, 8, 16, 32}, noise=1.0, force=True)[0].crossover == Crossover(END, END)


def test_it_is_kept_for_other_processes_and_not_measured_again(cache):
    measured({1, 2, 4, 8, 16, 32})
    assert measured(set())[0].state == "known" and measured(set())[1].asked == []
    store.forget_memory()
    env.refresh()
    assert CROSSOVER.look_up(*_question()).source == "user" and len(answers()) == 9
    assert measured(set(), force=True)[0].crossover == Crossover(END, END) and answers() == []
    store.forget_memory()
    env.refresh()
    assert answers() == []


def _question(N=N, K=K):
    from fusedops.ops.sparse_matmul._crossover import question

    return question(N, K, torch.float32, CPU)


def test_damaged_entries_are_a_miss(cache):
    measured(set())
    (file,) = cache.rglob("*.json")
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "config": {"first": 3, "last": 1}}))
    store.forget_memory()
    env.refresh()
    with pytest.warns(fusedops.tuning.TuningWarning, match="wrong checksum"):
        assert len(answers()) == 9


def test_neighbouring_sizes_share_the_answer_and_others_do_not():
    measured({1})
    assert CROSSOVER.choose(*_question(2 * N, K)) == Crossover(1, 1)
    assert CROSSOVER.choose(*_question(5 * N, K)) == Crossover()


def test_out_of_time_is_said_and_goes_on_the_next_time():
    assert measured({1, 2}, seconds=-1.0)[0].state == "partly measured"
    assert measured({1, 2})[0].state == "measured" and answers() == [1, 2]


def test_an_explanation_tells():
    call = torch.randn(3, K), *fusedops.compress_24(fusedops.prune_24(torch.randn(N, K)))
    assert "not measured: sparse for any number of rows" in str(fusedops.explain("sparse_matmul", *call))
    measured({2, 4})
    told = fusedops.explain("sparse_matmul", *call)
    assert dict(told.notes) == {"crossover": "sparse from 2 rows to 4, where a layer keeps both (memory)"}
    measured(set(), force=True)
    assert "dense for any number of rows" in str(fusedops.explain("sparse_matmul", *call))


@pytest.mark.parametrize("format", [None, "int8"])
def test_a_layer_follows(format):
    """Its dense copy holds something else here, so that the result says which weight was taken."""
    layer = Sparse24Linear.from_linear(torch.nn.Linear(K, N), prune=True, format=format, dense_below="measured")
    layer.dense.zero_()
    bias = layer.bias.detach()

    def is_dense(rows):
        with torch.no_grad():
            return torch.equal(layer(torch.ones(rows, K)), bias.expand(rows, N))

    assert not any(map(is_dense, (1, 2, 8, 64)))
    measured({2, 4, 8}, layer.weight.dtype)
    assert [rows for rows in (1, 2, 3, 8, 9, 64) if is_dense(rows)] == [1, 9, 64]
    with batch_invariant():
        assert not any(map(is_dense, (1, 2, 64)))


def test_in_a_batch_invariant_block_no_number_of_rows_chooses():
    layer = Sparse24Linear.from_linear(torch.nn.Linear(K, N), prune=True, dense_below=100)
    layer.dense.zero_()
    x = torch.randn(3, K)
    with torch.no_grad(), batch_invariant():
        assert not torch.equal(layer(x), layer.bias.expand(3, N))


def test_a_real_measurement_on_this_machine(capsys):
    """Through the command: whatever is faster here, the answer agrees with the figures that it prints."""
    assert main(["tune", "--crossover", f"{N}x{K}", "--dtype", "float32", "--seconds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    crossover = Crossover(**found["crossover"])
    for rows in (1, 2, 4):
        if f"dense {rows}" in found["timings"] and crossover.is_sparse(rows):
            assert found["timings"][f"sparse {rows}"] < found["timings"][f"dense {rows}"]


def test_nothing_is_measured_where_only_defaults_are_used():
    with batch_invariant():
        found, watch = measured(set())
    assert found.state == "only defaults are used" and watch.asked == [] and len(answers()) == 9


@pytest.mark.parametrize(
    ("sizes", "message"), [((0, 4), "out_features must be at least 1, got 0"), ((4, True), "in_features must be")]
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=f"tune_crossover: {message}"):
        tune_crossover(*sizes, torch.float32)

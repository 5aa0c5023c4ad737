"""What the demo's numbers mean: order of rounds, ratios, token comparison, memory, the shared twin."""

import os

import pytest
import torch

from fusedops.cli import demo, measure


def make_run(tokens=(1, 2, 3), first=1.0, intervals=(0.5, 0.5)):
    return measure.Run(tuple(tokens), first, tuple(intervals), 0)


def test_tokens_per_second_counts_the_prompt_too():
    assert make_run().tokens_per_second == 1.5


@pytest.mark.parametrize(
    "a, b, index", [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (), None), ((), (1,), 0)]
)
def test_first_difference(a, b, index):
    assert measure.first_difference(a, b) == index


def test_ratio_is_that_of_each_round():
    """A machine that slows down between rounds must not change the ratio."""
    before = [make_run(first=scale, intervals=(scale, scale)) for scale in (1.0, 3.0, 10.0)]
    after = [make_run(first=scale / 2, intervals=(scale / 2, scale / 2)) for scale in (1.0, 3.0, 10.0)]
    assert measure.ratios(before, after) == {"first_token": 2.0, "between_tokens": 2.0, "tokens_per_second": 2.0}


def test_single_tokens_have_no_interval():
    runs = [make_run(tokens=(1,), intervals=())]
    assert measure.summarise(runs)["between_tokens"] is None
    assert measure.ratios(runs, runs)["between_tokens"] is None


def test_rounds_alternate_after_a_warm_up(monkeypatch):
    calls = []

    def generate(model, inputs, num_tokens, exactly):
        calls.append(model)
        return make_run()

    monkeypatch.setattr(measure, "generate", generate)
    runs = measure.alternate({"a": "A", "b": "B"}, None, 64, 3)
    assert calls == ["A", "B"] + ["A", "B"] + ["B", "A"] + ["A", "B"]
    assert len(runs["a"]) == len(runs["b"]) == 3


def test_disagreement_is_told_with_its_place():
    right = make_run()
    runs = {"unpatched": [right, right], "patched": [right, make_run(tokens=(1, 2, 4))]}
    told = demo._agreement((5, 6), (5, 7), runs)
    assert not told["equal"]
    assert told["text"] == ("Greedy tokens: the answers differ from token 1 on; patched run 2 differs from token 2 on.")


def test_twin_shares_weights_but_not_modules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    other = measure.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert all(a is not b for a, b in zip(model.modules(), other.modules(), strict=True))


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot reset a process's peak memory"
)
def test_peak_memory_sees_what_the_block_allocates():
    size = 64 * 2**20
    with measure.PeakMemory(torch.device("cpu")) as idle:
        pass
    with measure.PeakMemory(torch.device("cpu")) as busy:
        torch.ones(size, dtype=torch.uint8).sum()
    assert busy.bytes - idle.bytes >= size // 2

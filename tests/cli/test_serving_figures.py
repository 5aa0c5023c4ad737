"""What `fusedops bench model` computes from runs, against figures worked out by hand; and the requests it makes."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from fusedops.cli import serving, serving_figures, traffic
from fusedops.cli.console import CommandError
from fusedops.cli.serving import KvSample, Run, Served
from fusedops.cli.traffic import Request

REQUESTS = [Request((1, 2, 3), 2), Request((4,), 3, arrival=1.0)]
SERVED = [Served((7, 8), (0.5, 2.5)), Served((9, 9, 6), (2.0, 3.0, 6.0))]


def test_figures_of_two_requests():
    run = Run(SERVED, [KvSample(100, 50), KvSample(300, 150), KvSample(200, 100)], pool_bytes=400, peak_bytes=9)
    told = serving_figures.summarise(REQUESTS, [run], price_per_hour=36.0)
    assert told["seconds"] == told["low"] == told["high"] == 6.0
    assert told["requests_per_minute"] == 20.0 and told["tokens_per_second"] == pytest.approx(5 / 6)
    assert told["first_token"] == {"p50": 1.0, "p95": 1.0, "p99": 1.0}  # 0.5 and 1.0, from each one's arrival
    assert told["between_tokens"] == {"p50": 2.0, "p95": 3.0, "p99": 3.0}  # 2, 1 and 3
    assert [request["end_to_end"] for request in told["requests"]] == [2.5, 5.0]
    assert told["kv"] == {"held_over_used": 2.0, "peak_held_bytes": 300, "median_used_bytes": 100}
    assert told["pool_bytes"] == 400 and told["peak_bytes"] == 9
    assert told["cost"] == {"per_million_tokens": pytest.approx(12000.0), "per_request": pytest.approx(0.03)}


def test_without_price_samples_and_intervals_there_are_no_figures():
    told = serving_figures.summarise([Request((1,), 1)], [Run([Served((5,), (2.0,))], [])])
    assert told["cost"] == {"per_million_tokens": None, "per_request": None}
    assert told["kv"] == {"held_over_used": None, "peak_held_bytes": None, "median_used_bytes": None}
    assert told["between_tokens"] == {"p50": None, "p95": None, "p99": None}


def test_percentiles_of_a_hundred():
    assert serving_figures.percentiles(range(100)) == {"p50": 50, "p95": 95, "p99": 99}


def scaled(factor):
    return Run([Served(one.tokens, tuple(time * factor for time in one.times)) for one in SERVED], [])


def test_rounds_give_medians_and_ratios_of_the_same_round():
    runs = [scaled(factor) for factor in (1, 4, 2)]
    told = serving_figures.summarise(REQUESTS, runs)
    assert (told["seconds"], told["low"], told["high"]) == (12.0, 6.0, 24.0)
    slower = [scaled(3 * factor) for factor in (1, 4, 2)]
    assert serving_figures.times_as_fast(runs, slower) == pytest.approx(3.0)


def test_the_first_token_that_differs_is_named():
    reference = Run(SERVED, [])
    assert serving_figures.first_mismatch([reference, scaled(2)], reference) is None
    wrong = Run([SERVED[0], Served((9, 1, 6), SERVED[1].times)], [])
    short = Run([Served((7,), (0.5,)), SERVED[1]], [])
    assert serving_figures.first_mismatch([wrong], reference) == ("request 1, token 1: 1 instead of 9", 1)
    assert serving_figures.first_mismatch([reference, short, wrong], reference) == (
        "request 0 in round 2, token 1: nothing instead of 8",
        2,
    )
    assert serving_figures.leading_equal([reference], reference) == 1
    assert serving_figures.leading_equal([wrong], reference) == 3 / 5  # two of the first answer, one of the second


def test_a_padded_batch_holds_its_padding_and_its_ended_rows():
    """Two layers of 2 rows x 1 head x 8 places x 4 numbers; the second row wanted one token and has it."""
    layers = [SimpleNamespace(keys=torch.zeros(2, 1, 8, 4), values=torch.zeros(2, 1, 8, 4)) for _ in range(2)]
    output = SimpleNamespace(past_key_values=SimpleNamespace(layers=layers))
    batch = [Request((1,) * 6, 4), Request((1,) * 3, 1)]
    token = 2 * 2 * 4 * 4  # bytes: layers, keys and values, numbers, float32
    assert serving._batch_sample(output, batch, step=0) == KvSample(2 * 8 * token, (6 + 3) * token)
    assert serving._batch_sample(output, batch, step=2) == KvSample(2 * 8 * token, 8 * token)
    short = SimpleNamespace(keys=torch.zeros(2, 1, 4, 4), values=torch.zeros(2, 1, 4, 4))  # a window of 4
    output.past_key_values.layers = [short]
    assert serving._batch_sample(output, batch, step=0) == KvSample(2 * 4 * token // 2, (4 + 3) * token // 2)


def engine(block_table, lengths, **allocator):
    """What a sample reads of transformers' engine: pages of 4 tokens, 10 bytes a token."""
    made = SimpleNamespace(tokens_per_page=4, bytes_per_block=40, block_table=block_table, **allocator)
    active = {name: SimpleNamespace(position_offset=length) for name, length in lengths.items()}
    return SimpleNamespace(
        scheduler=SimpleNamespace(active_requests=active), cache=SimpleNamespace(cache_allocators={"full": made})
    )


@pytest.mark.parametrize(
    "processor, sample",
    [
        (engine({"a": [0, 1], "b": [5]}, {"a": 5, "b": 4}), KvSample(3 * 40, 9 * 10)),
        (engine({"a": [0, 1], "b": [0, 2]}, {"a": 8, "b": 6}), KvSample(3 * 40, 10 * 10)),  # page 0 is shared
        (engine({"a": [3]}, {"a": 11}, sliding_window=3), KvSample(40, 3 * 10)),
    ],
    ids=("two", "shared", "window"),
)
def test_pages_of_live_requests(processor, sample):
    assert serving._paged_sample(processor) == sample


def test_pages_needed_leave_a_quarter_free():
    assert serving.pages_needed([Request((1,) * 17, 15), Request((1,), 64)], 16) == 2 + 5 + 2


def test_requests_are_pieces_of_the_text_and_repeat_with_the_seed():
    text = list(range(1000))
    made = traffic.make_requests(text, 50, (5, 20), (1, 3), seed=3)
    assert made == traffic.make_requests(text, 50, (5, 20), (1, 3), seed=3)
    assert made != traffic.make_requests(text, 50, (5, 20), (1, 3), seed=4)
    assert {len(request.prompt) for request in made} == set(range(5, 21))
    assert {request.new_tokens for request in made} == {1, 2, 3}
    assert all(request.prompt == tuple(range(request.prompt[0], request.prompt[-1] + 1)) for request in made)
    assert all(request.arrival == 0 for request in made)
    with pytest.raises(CommandError, match="--prompt-tokens must be at most 1000, got 1001"):
        traffic.make_requests(text, 1, (5, 1001), (1, 1), seed=0)


def test_requests_arrive_at_the_rate():
    arrivals = [request.arrival for request in traffic.make_requests([1], 2000, (1, 1), (1, 1), seed=0, rate=4.0)]
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    assert arrivals[-1] / 1999 == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("text, lengths", [("64", (64, 64)), ("16-512", (16, 512))])
def test_span(text, lengths):
    assert traffic.span(text) == lengths and traffic.in_words(lengths) == text


@pytest.mark.parametrize("text", ["", "0", "-3", "5-2", "1-2-3", "a-b", "1.5"])
def test_bad_span(text):
    with pytest.raises(argparse.ArgumentTypeError):
        traffic.span(text)

"""What runs of served requests amount to: rates, latencies, KV memory and cost. Arithmetic on plain numbers."""

import statistics

from fusedops.cli import measure

SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
LATENCIES = ("first_token", "between_tokens", "end_to_end")


def percentiles(values):
    """The 50th, 95th and 99th percentile, None where there is no value."""
    return {name: measure.percentile(values, share) if values else None for name, share in SHARES.items()}


def latencies(requests, served):
    """Seconds from each request's arrival to its first and to its last token, and between any two of its tokens."""
    pairs = list(zip(requests, served, strict=True))
    return {
        "first_token": [answer.times[0] - request.arrival for request, answer in pairs],
        "between_tokens": [
            after - before for answer in served for before, after in zip(answer.times, answer.times[1:], strict=False)
        ],
        "end_to_end": [answer.times[-1] - request.arrival for request, answer in pairs],
    }


def seconds(served):
    """Time from the arrival of the first request to the last token of any."""
    return max(answer.times[-1] for answer in served)


def kv_figures(samples):
    """Bytes held over bytes used, both summed over the steps, the most held, those used in a median step, if any."""
    if not samples:
        return {"held_over_used": None, "peak_held_bytes": None, "median_used_bytes": None}
    return {
        "held_over_used": sum(sample.held for sample in samples) / sum(sample.used for sample in samples),
        "peak_held_bytes": max(sample.held for sample in samples),
        "median_used_bytes": statistics.median(sample.used for sample in samples),
    }


def cost(price_per_hour, taken, requests, tokens):
    """What a million generated tokens and one request cost on a machine of that price; None without a price."""
    if price_per_hour is None:
        return {"per_million_tokens": None, "per_request": None}
    spent = price_per_hour * taken / 3600
    return {"per_million_tokens": spent / tokens * 1e6, "per_request": spent / requests}


def summarise(requests, runs, price_per_hour=None):
    """Everything about one way: medians over its rounds, percentiles over all of them, the greatest memory.

    Args:
        requests: What was served, the same in each round.
        runs: One `fusedops.cli.serving.Run` a round.
        price_per_hour: Of the machine.
    """
    times = [seconds(run.served) for run in runs]
    taken, tokens = statistics.median(times), sum(request.new_tokens for request in requests)
    rounds = [latencies(requests, run.served) for run in runs]
    merged = {name: [value for found in rounds for value in found[name]] for name in LATENCIES}
    return {
        "seconds": taken,
        "low": min(times),
        "high": max(times),
        "requests_per_minute": len(requests) / taken * 60,
        "tokens_per_second": tokens / taken,
        **{name: percentiles(values) for name, values in merged.items()},
        "kv": kv_figures([sample for run in runs for sample in run.kv]),
        "pool_bytes": runs[0].pool_bytes,
        "peak_bytes": max(run.peak_bytes for run in runs),
        "cost": cost(price_per_hour, taken, len(requests), tokens),
        "requests": [
            {
                "prompt_tokens": len(request.prompt),
                "new_tokens": request.new_tokens,
                "arrival": request.arrival,
                "first_token": first,
                "end_to_end": whole,
            }
            for request, first, whole in zip(requests, rounds[0]["first_token"], rounds[0]["end_to_end"], strict=True)
        ],
    }


def times_as_fast(runs, others):
    """Median over the rounds of how many times as fast `runs` are as the `others` of the same round."""
    pairs = zip(runs, others, strict=True)
    return statistics.median(seconds(other.served) / seconds(run.served) for run, other in pairs)


def first_mismatch(runs, reference):
    """The first token that differs from the reference's, as text, and how many requests differ; None where none does.

    Args:
        runs: One way's, a run a round.
        reference: One run whose tokens are right.
    """
    differing, first = 0, None
    for round_number, run in enumerate(runs, 1):
        for number, (answer, right) in enumerate(zip(run.served, reference.served, strict=True)):
            place = measure.first_difference(right.tokens, answer.tokens)
            if place is None:
                continue
            differing += 1
            where = f"request {number}" + (f" in round {round_number}" if len(runs) > 1 else "")
            got = [tokens[place] if place < len(tokens) else "nothing" for tokens in (answer.tokens, right.tokens)]
            first = first or f"{where}, token {place}: {got[0]} instead of {got[1]}"
    return (first, differing) if differing else None


def leading_equal(runs, reference):
    """The share of tokens before the first that differs from the reference's, over all requests and rounds."""
    equal = tokens = 0
    for run in runs:
        for answer, right in zip(run.served, reference.served, strict=True):
            place = measure.first_difference(right.tokens, answer.tokens)
            equal += len(right.tokens) if place is None else place
            tokens += len(right.tokens)
    return equal / tokens

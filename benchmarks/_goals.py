"""What the goals of a Hopper GPU amount to over all rows, each judged on its own. Needs nothing but Python.

Goals of one operator on one shape stand in the rows too, judged there; here is one line for each part of a goal.
"""

import math
import re
from dataclasses import dataclass

from _rows import EAGER, ON_DEVICE

DENSE = ("F.linear", "matmul", "_int_mm", "_scaled_mm", "int8_matmul", "fp8_matmul")  # peers of sparse products
LINEAR = ("bf16 linear", "F.linear of the expanded weight")  # peers of products of 8-bit weights
FP8, BF16 = "float8_e4m3fn", "bfloat16"
MIB = 2**20
LEAST_PAGED_BYTES = 256 * MIB  # of keys and values, from which decoding is bound by the memory
LEAST_WEIGHT_BYTES = 32 * MIB
SKEWED, EVEN = "1x128k and 31x4k, page 16", "even, page 16"  # as bench_paged_attention calls them


@dataclass(frozen=True)
class Goal:
    """A part of a goal.

    Attributes:
        number: Of the goal.
        asked: What is asked for.
        found: What was found, in words.
        met: Whether that is enough; None where nothing tells.
    """

    number: int
    asked: str
    found: str
    met: bool | None

    def __str__(self):
        answer = {None: "not run", True: "met", False: "no"}[self.met]
        return f"goal {self.number}: {self.asked}: {self.found} [{answer}]"


def judge(rows, host=(), models=()):
    """Every part of every goal.

    Args:
        rows: Of the benchmarks of operators.
        host: Of host_cost.py.
        models: Of ``fusedops bench model``.
    """
    timed = [row for row in rows if row["timed"] == ON_DEVICE]
    judged = [
        *_attention(_of(timed, "attention")), *_paged(_of(timed, "paged_attention")), *_norms(timed),
        *_products(_of(timed, "fp8_matmul"), _of(timed, "int8_matmul")), *_few_rows(timed),
        *_sparse(_of(timed, "sparse_matmul")), *_models(models, timed), *_host(host, timed, rows),
    ]  # fmt: skip
    return [Goal(*parts) for parts in judged]


def _attention(rows):
    prefill = [row for row in rows if re.fullmatch(r"\d+x\d+x\S+x\d+( causal)?", row["shape"])]
    exact = [row for row in prefill if row["dtype"] == BF16]
    long = [row for row in exact if row["shape"].endswith("causal") and int(row["shape"].split("x")[1]) >= 8192]
    yield 1, "attention of a prompt by the best peer >= 0.97", *_ratios(exact, (), least=0.97)
    yield 1, "causal attention of 8,192 tokens or more >= 80 % of TC*", *_shares(long, 0.80, "share_of_matmul_rate")
    fp8 = [row for row in prefill if row["dtype"] == FP8]
    yield 2, "attention in float8 by that in bfloat16 >= 1.45", *_at_least(_by_ours(exact, fp8), 1.45)


def _paged(rows):
    exact = [row for row in rows if row["dtype"] == BF16]
    large = [row for row in exact if row["bytes"] >= LEAST_PAGED_BYTES]
    yield 3, "decoding from 256 MiB of keys and values >= 90 % of BW*", *_shares(large, 0.90)
    yield 3, "decoding by the best peer >= 1.0 in 90 % of rows, least >= 0.95", *_most(exact, 1.0, 0.9, 0.95)
    fp8 = [row for row in rows if row["dtype"] == FP8]
    yield 3, "decoding from float8 by that from bfloat16, time <= 0.56", *_at_most(_by_ours(fp8, exact), 0.56)
    seconds = {row["shape"]: row["seconds"] for row in exact}
    pairs = [(name, name.replace("page 16", "page 64")) for name in seconds if name.endswith("page 16")]
    pages = [seconds[small] / seconds[large] for small, large in pairs if large in seconds]
    yield 3, "decoding from pages of 16 by those of 64, time <= 1.03", *_at_most(pages, 1.03)
    skewed = [seconds[SKEWED] / seconds[EVEN]] if {SKEWED, EVEN} <= seconds.keys() else []
    yield 4, "decoding of one long sequence among short ones by even ones, time <= 1.15", *_at_most(skewed, 1.15)
    sizes = {name: re.fullmatch(r"(\d+)x8192, page 16", name) for name in seconds}
    each = sorted((int(size[1]), seconds[name]) for name, size in sizes.items() if size)
    steps = [(after / more) / (before / fewer) for (fewer, before), (more, after) in zip(each, each[1:], strict=False)]
    yield 4, "decoding, time of a sequence from a batch to the next larger one <= 1.10", *_at_most(steps, 1.10)


def _norms(timed):
    plain = [row for row in _of(timed, "rms_norm", "add_rms_norm") if _size(row) >= 8192]
    codes = [row for row in _of(timed, "rms_norm_quantized", "add_rms_norm_quantized") if _size(row) >= 8192]
    yield 5, "rms_norm of 8,192 rows or more >= 97 % of BW*", *_shares(plain, 0.97)
    yield 5, "rms_norm by QuACK and Liger >= 1.0", *_ratios(plain, ("quack", "liger"), least=1.0)
    yield 5, "rms_norm to int8 and float8 >= 88 % of BW*", *_shares(codes, 0.88)
    yield 5, "rms_norm to float8 by FlashInfer >= 1.2", *_ratios(codes, ("flashinfer",), least=1.2)


def _products(fp8, int8):
    by_rows = [[row for row in rows if _kind(row) == "rows"] for rows in (fp8, int8)]
    many_fp8, many_int8 = ([row for row in rows if _size(row) >= 1024] for rows in by_rows)
    blocks = [row for row in fp8 if _kind(row) == "blocks" and _size(row) >= 1024]
    yield 6, "fp8_matmul by _scaled_mm, geomean >= 1.0, least >= 0.96", *_ratios(many_fp8, ("_scaled_mm",), 1.0, 0.96)
    yield 6, "fp8_matmul with scales of blocks by DeepGEMM >= 0.97", *_ratios(blocks, ("deep_gemm",), least=0.97)
    yield 7, "int8_matmul by _int_mm, geomean >= 1.3, least >= 1.0", *_ratios(many_int8, ("_int_mm",), 1.3, 1.0)
    yield 7, "int8_matmul by fp8_matmul, time <= 1.15", *_at_most(_by_ours(by_rows[1], by_rows[0]), 1.15)


def _few_rows(timed):
    """Of 8-bit weights; a name of bench_weight_only_matmul begins with the kind of codes."""
    rows = _of(timed, "fp8_matmul", "int8_matmul", "weight_only_matmul")
    sized = [(row, re.match(r"(int8 |fp8 |)(\d+)x(\d+)x(\d+)", row["shape"])) for row in rows]
    large = [
        (row, int(found[2])) for row, found in sized
        if found and int(found[2]) <= 64 and int(found[3]) * int(found[4]) >= LEAST_WEIGHT_BYTES
    ]  # fmt: skip
    yield 8, "products of 1 to 64 rows with 32 MiB of weights >= 88 % of BW*", *_shares([row for row, _ in large], 0.88)
    fewer = [row for row, size in large if size <= 32]
    yield 8, "products of 1 to 32 rows by bfloat16's >= 1.75", *_ratios(fewer, LINEAR, least=1.75)


def _sparse(rows):
    many, few = [row for row in rows if _size(row) >= 2048], [row for row in rows if _size(row) <= 64]
    for asked, chosen, least in (("M >= 2048", many, 1.35), ("M <= 64", few, 1.5), ("everywhere", rows, 0.99)):
        yield 9, f"sparse_matmul by the best dense product, {asked} >= {least}", *_ratios(chosen, DENSE, least=least)


def _of(rows, *operators):
    return [row for row in rows if row["op"] in operators]


def _size(row):
    """Rows of the first operand, with which a shape begins; 0 where it names none."""
    found = re.match(r"(\d+)x", row["shape"])
    return int(found[1]) if found else 0


def _kind(row):
    """What the scales of a product are of."""
    return row["shape"].partition(" ")[2].partition(",")[0]


def _by_ours(numerators, denominators):
    """Our time in the one by our time in the other, of each shape that both have."""
    seconds = {row["shape"]: row["seconds"] for row in denominators}
    return [row["seconds"] / seconds[row["shape"]] for row in numerators if row["shape"] in seconds]


def _peer_ratios(rows, prefixes):
    """How many times as fast ours is as the fastest peer whose name begins so (none named: as any) in each row."""
    pairs = [(row, [t for name, t in row["peers"].items() if name.startswith(prefixes or "")]) for row in rows]
    return [min(times) / row["seconds"] for row, times in pairs if times]


def _ratios(rows, prefixes, mean=0.0, least=0.0):
    ratios = _peer_ratios(rows, prefixes)
    if not ratios:
        return "no row has both", None
    geomean, worst = math.exp(math.fsum(map(math.log, ratios)) / len(ratios)), min(ratios)
    return f"geomean {geomean:.3f}, least {worst:.3f} of {len(ratios)}", geomean >= mean and worst >= least


def _most(rows, usual, part, least):
    """At least `usual` in that part of the rows, and never below `least`."""
    ratios = _peer_ratios(rows, ())
    if not ratios:
        return "no row has both", None
    reached = sum(ratio >= usual for ratio in ratios)
    found = f"{reached} of {len(ratios)} reach {usual}, least {min(ratios):.3f}"
    return found, reached >= part * len(ratios) and min(ratios) >= least


def _shares(rows, least, of="share_of_copy_bandwidth"):
    """Of the ceiling."""
    return _at_least([row[of] for row in rows if row.get(of) is not None], least)


def _at_least(values, least):
    if not values:
        return "no row tells", None
    return f"least {min(values):.3f} of {len(values)}", min(values) >= least


def _at_most(values, most):
    if not values:
        return "no row tells", None
    return f"largest {max(values):.3f} of {len(values)}", max(values) <= most


def _models(models, timed):
    """Rows of ``fusedops bench model``: of one request at a time, and of 32 together."""
    one, many = ([row for row in models if row["workload"]["prompts"] == prompts] for prompts in (1, 32))
    bandwidth = max((row.get("copy_bandwidth", 0) for row in timed), default=0)
    plain = [row for row in one if row["patched"] and not _is_quantised(row)]
    coded = [row for row in one if row["patched"] and _is_quantised(row)]
    others = [row for row in one if not row["patched"]]
    compiled = [row for row in others if "compiled" in row["timed"]]
    eager = [row for row in others if "compiled" not in row["timed"]]
    shares = [
        row["weight_bytes"] / row["between_tokens"]["p50"] / bandwidth
        for row in plain if bandwidth and row.get("weight_bytes") and row["between_tokens"]["p50"]
    ]  # fmt: skip
    best = [max(shares)] if shares else []
    yield 10, "patched model, one request, bytes of weights >= 82 % of BW*", *_at_least(best, 0.82)
    yield 10, "patched model in int8 or float8 by that in bfloat16 >= 1.7", *_faster(coded, plain, 1.7)
    yield 10, "patched model by eager >= 4", *_faster(plain, eager, 4.0)
    yield 10, "patched model by torch.compile with a static cache >= 1.1", *_faster(plain, compiled, 1.1)
    paged = [row for row in many if row["patched"] and row["kv"]["held_over_used"] is not None]
    theirs = [row for row in many if not row["patched"] and row["timed"] == "transformers paged"]
    yield 11, "patched paged model, 32 requests, by transformers' >= 2", *_faster(paged, theirs, 2.0)
    yield 11, "KV bytes held by those used <= 1.04", *_at_most([row["kv"]["held_over_used"] for row in paged], 1.04)


def _is_quantised(row):
    return any(code in row["timed"] for code in ("int8", "int4", "fp8"))


def _faster(ours, theirs, least):
    """The fastest way of ours by the fastest of theirs."""
    if not ours or not theirs:
        return "no run has both", None
    ratio = max(row["tokens_per_second"] for row in ours) / max(row["tokens_per_second"] for row in theirs)
    return f"{ratio:.3f}", ratio >= least


def _host(host, timed, rows):
    """Of host_cost.py, and wall times of one row of 4,096 beside its time on the GPU."""
    seconds = {row["op"]: row["seconds"] for row in host}
    for unit, most in (("empty_like", 4.0), ("kernel[grid] of rms_norm", 0.35)):
        known = "rms_norm" in seconds and unit in seconds
        ratios = [seconds["rms_norm"] / seconds[unit]] if known else []
        yield 12, f"rms_norm on the host by {unit}, time <= {most}", *_at_most(ratios, most)
    on_gpu = any(row["op"] == "rms_norm" for row in timed)
    small = [row for row in _of(rows, "rms_norm") if row["timed"] == EAGER and row["shape"] == "1x4096" and on_gpu]
    eager = [row["seconds"] / row["peers"]["torch"] for row in small if "torch" in row["peers"]]
    yield 12, "rms_norm of 1x4096 by F.rms_norm, wall time <= 1.0", *_at_most(eager, 1.0)

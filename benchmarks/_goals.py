"""Goals that no single row can tell: geometric means, and one operator beside another. Needs nothing but Python."""

import math
import re

from _rows import ON_DEVICE

SCALED_MM, INT_MM, DENSE = "_scaled_mm", "_int_mm", "dense"  # how the names of these peers begin
MANY, SPARSE_MANY, FEW = 1024, 2048, 64  # rows
SLOWEST_DISPATCH = 0.99  # of dense, anywhere
INT8_BY_FP8 = 1.15  # at most, of our times


def judge(rows):
    """(goal, what was found in words, whether it is met or None where no row tells) of each."""
    timed = [row for row in rows if row["timed"] == ON_DEVICE]
    fp8, int8 = ([row for row in timed if row["op"] == op and _kind(row) == "rows"] for op in
                 ("fp8_matmul", "int8_matmul"))  # fmt: skip
    sparse = [row for row in timed if row["op"] == "sparse_matmul"]
    many = [row for row in sparse if _size(row) >= SPARSE_MANY]
    few = [row for row in sparse if _size(row) <= FEW]
    return [
        ("6: fp8_matmul by _scaled_mm, geomean >= 1.0, least >= 0.96", *_ratios(_large(fp8), SCALED_MM, 1.0, 0.96)),
        ("7: int8_matmul by _int_mm, geomean >= 1.3, least >= 1.0", *_ratios(_large(int8), INT_MM, 1.3, 1.0)),
        ("7: int8_matmul's time by fp8_matmul's <= 1.15", *_int8_by_fp8(int8, fp8)),
        ("9: sparse_matmul by dense, M >= 2048, least >= 1.35", *_ratios(many, DENSE, 1.35, 1.35)),
        ("9: sparse_matmul by dense, M <= 64, least >= 1.5", *_ratios(few, DENSE, 1.5, 1.5)),
        ("9: sparse_matmul by dense, everywhere >= 0.99", *_ratios(sparse, DENSE, 0.99, SLOWEST_DISPATCH)),
    ]


def lines(rows):
    """The judged goals as text."""
    answer = {None: "not run", True: "met", False: "no"}
    return [f"goal {goal}: {found} [{answer[met]}]" for goal, found, met in judge(rows)]


def _size(row):
    """Rows of the first operand, with which a shape begins; 0 where it names none."""
    found = re.match(r"(\d+)x", row["shape"])
    return int(found[1]) if found else 0


def _kind(row):
    """What the scales of a product are of."""
    return row["shape"].partition(" ")[2].partition(",")[0]


def _large(rows):
    return [row for row in rows if _size(row) >= MANY]


def _ratios(rows, prefix, mean, least):
    """How many times as fast ours is as the fastest peer of that name in each row."""
    pairs = [(row, [t for name, t in row["peers"].items() if name.startswith(prefix)]) for row in rows]
    ratios = [min(times) / row["seconds"] for row, times in pairs if times]
    if not ratios:
        return "no row has both", None
    geomean, worst = math.exp(math.fsum(map(math.log, ratios)) / len(ratios)), min(ratios)
    return f"geomean {geomean:.3f}, least {worst:.3f} of {len(ratios)}", geomean >= mean and worst >= least


def _int8_by_fp8(int8, fp8):
    of_fp8 = {row["shape"]: row["seconds"] for row in fp8}
    ratios = [row["seconds"] / of_fp8[row["shape"]] for row in int8 if row["shape"] in of_fp8]
    if not ratios:
        return "no row has both", None
    return f"largest {max(ratios):.3f} of {len(ratios)}", max(ratios) <= INT8_BY_FP8

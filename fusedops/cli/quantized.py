"""The quantised model of the demo: made from the weights of another, and what it holds and says beside that one."""

from fusedops.cli import setting
from fusedops.cli.console import CommandError, first_line

SCHEMES = ("int8-weight-only", "fp8-weight-only", "int4-weight-only", "int8", "fp8")
MIB = 2**20
BFLOAT16_BYTES = 2


def twin(model, scheme, console):
    """A quantised and patched model of the same weights, the patch's handle, and what its converted layers hold."""
    import fusedops
    from fusedops.cli import measure

    made = measure.twin(model)
    try:
        with console.step(f"Quantising to {scheme}") as show:
            report = fusedops.quantize_(made, scheme, progress=lambda done, total: show(f"{done} of {total}")).report
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CommandError(f"this model cannot be quantised: {first_line(error)}") from error
    console.line(str(report))
    totals = report.totals
    in_bfloat16 = totals["bytes_before"] // model.dtype.itemsize * BFLOAT16_BYTES
    told = {
        "scheme": scheme, "layers": totals["quantized"], "weight_bytes": totals["bytes_after"],
        "times_bfloat16": totals["bytes_after"] / in_bfloat16,
    }  # fmt: skip
    return made, setting.patch(made, console), told


def compare(result, console):
    """Print what the quantised layers hold and how far its tokens are the unpatched model's; add that to the result."""
    from fusedops.cli import measure

    told, answers = result["quantized"], result["answers"]
    wanted, found = answers["unpatched"], answers["quantized"]
    first = measure.first_difference(wanted, found)
    told["equal_leading_tokens"] = len(found) if first is None else first
    size = f"{told['weight_bytes'] / MIB:.1f} MiB, {told['times_bfloat16']:.2f} times those in bfloat16"
    console.line(f"Weights of the {told['layers']} converted layers: {size}.")
    console.line(
        f"Tokens of the quantised model: the first {told['equal_leading_tokens']} of {len(found)} are the unpatched "
        f"model's. They need not agree: it is judged by its perplexity (fusedops bench accuracy)."
    )

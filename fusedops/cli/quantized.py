"""The pruned or quantised model of the demo: made from the weights of another, and what it holds and says beside it."""

from fusedops.cli import corpus, setting
from fusedops.cli.console import CommandError, first_line
from fusedops.cli.ways import CALIBRATION_WINDOWS, MLP

SCHEMES = ("int8-weight-only", "fp8-weight-only", "int4-weight-only", "int8", "fp8")
OF_SPARSE = ("int8", "fp8")  # the schemes that take 2:4 sparse layers
WITH_HEAD = ("int8-weight-only",)  # what takes the output head too, unless it is told not to
METHODS = ("wanda", "magnitude")
MIB = 2**20
BFLOAT16_BYTES = 2
WINDOW = 512


def name_of(args):
    """What the converted model is called in tables; None where none is asked for.

    Raises:
        CommandError: the two options do not go together.
    """
    if args.sparsify and args.quantize and args.quantize not in OF_SPARSE:
        raise CommandError(f"--sparsify goes with --quantize {' or '.join(OF_SPARSE)}, got {args.quantize}")
    if args.output_head is not None and not args.quantize:
        raise CommandError("--output-head and --no-output-head go with --quantize, got none")
    return "sparse" if args.sparsify else "quantized" if args.quantize else None


def twin(loaded, args, console):
    """A pruned, quantised and patched model of the same weights, the patch's handle, and what its layers hold.

    Args:
        loaded: The LoadedModel.
        args: Of the command: ``sparsify`` is a method of `fusedops.sparsify_`, for the MLPs, ``quantize`` a scheme of
            `fusedops.quantize_`, each or None; ``output_head`` its argument, or None for what the scheme has.
        console: Is told what happens.
    """
    import fusedops
    from fusedops.cli import measure

    method, scheme = args.sparsify, args.quantize
    with_head = scheme in WITH_HEAD if args.output_head is None else args.output_head
    made = measure.twin(loaded.model)
    calibration = _calibration(loaded) if method == "wanda" else None
    try:
        if method:
            with console.step(f"Pruning the MLPs to 2:4 by {method}") as show:
                options = {"method": method, "calibration": calibration, **MLP}
                report = fusedops.sparsify_(made, progress=_progress(show), **options).report
            console.line(str(report))
        if scheme:
            with console.step(f"Quantising to {scheme}") as show:
                report = fusedops.quantize_(made, scheme, output_head=with_head, progress=_progress(show)).report
            console.line(str(report))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CommandError(f"this model cannot be converted: {first_line(error)}") from error
    rows = report.converted
    in_bfloat16 = sum(row.shape[0] * row.shape[1] for row in rows if row.bytes_before) * BFLOAT16_BYTES
    stored = sum(row.bytes_after for row in rows)
    told = {
        "scheme": scheme, "layers": len(rows), "weight_bytes": stored, "times_bfloat16": stored / in_bfloat16,
    }  # fmt: skip
    return made, setting.patch(made, console), {"method": method, **told} if method else told


def _progress(show):
    return lambda done, total: show(f"{done} of {total}")


def _calibration(loaded):
    """Windows from the end of the text that every machine has."""
    import torch

    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    length = min(WINDOW, limit)
    ids = corpus.tokens(loaded.tokenizer, corpus.of_python())[-CALIBRATION_WINDOWS * length :]
    return [window[None] for window in torch.tensor(ids).split(length)]


def compare(result, name, console):
    """Print what the converted layers hold and how far its tokens are the unpatched model's; add that to the result."""
    from fusedops.cli import measure

    told, answers = result[name], result["answers"]
    wanted, found = answers["unpatched"], answers[name]
    first = measure.first_difference(wanted, found)
    told["equal_leading_tokens"] = len(found) if first is None else first
    size = f"{told['weight_bytes'] / MIB:.1f} MiB, {told['times_bfloat16']:.2f} times those in bfloat16"
    console.line(f"Weights of the {told['layers']} converted layers: {size}.")
    console.line(
        f"Tokens of the {name} model: the first {told['equal_leading_tokens']} of {len(found)} are the unpatched "
        f"model's. They need not agree: it is judged by its perplexity (fusedops bench accuracy)."
    )

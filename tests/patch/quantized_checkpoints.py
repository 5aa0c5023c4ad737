"""Checkpoints of tiny models, as floats and quantised, and what is asked of the models loaded from them."""

import json
import warnings

import torch

from fusedops import quantize_
from fusedops.nn import QuantizedLinear
from fusedops.patch import FusedOpsConfig
from tests.patch.tiny_models import tiny

SCHEMES = ("int8", "fp8", "int8-weight-only", "fp8-weight-only", "int4-weight-only")


def save_tiny(folder, family="llama", dtype=torch.float32, **options):
    """The folder of a float checkpoint."""
    tiny(family, dtype, **options).save_pretrained(folder)
    return folder


def load(folder, scheme=None, **options):
    """A model from a checkpoint, quantised on the way if a scheme or a FusedOpsConfig is given."""
    import transformers

    if scheme is not None:
        options["quantization_config"] = FusedOpsConfig(scheme) if isinstance(scheme, str) else scheme
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def linears(model, kind=QuantizedLinear):
    """``{path: module}`` of one kind."""
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def same_tensors(model, other):
    """Whether two models have the same parameters and buffers, bit for bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(_bits(tensor), _bits(theirs[name]))
        for name, tensor in ours.items()
    )


def quantized(model, scheme, **options):
    """The model after `quantize_`."""
    quantize_(model, scheme, **options)
    return model


def edit(folder, change=None, **config):
    """Change the tensors of a checkpoint of one file in place, and entries of its config."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization", {})
    text.update(config)
    if quantization:
        text["quantization_config"].update(quantization)
    (folder / "config.json").write_text(json.dumps(text))


def _bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor

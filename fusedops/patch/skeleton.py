"""A patched model from its config alone: on the meta device, with as few layers as show all of its kinds."""

import json
from pathlib import Path

import torch

from fusedops.patch.joined import all_on_meta
from fusedops.patch.quantizer import METHOD, found_scheme
from fusedops.patch.quantizer_modules import replace_linears

LEAST_LAYERS = 2  # the first layer and one behind another


def skeleton(path, dtype, scheme=None, sparsity=None):
    """A patched model without memory, whose calls are those of the real one.

    Args:
        path: A config.json.
        dtype: Of weights and activations.
        scheme: A name of `fusedops.quantize_`.
        sparsity: ``"2:4"`` or None. Without both the config says itself what its checkpoint holds.

    Raises:
        ValueError: transformers makes no causal language model of it, or nothing in it can be replaced.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import fusedops

    data = json.loads(Path(path).read_text())
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ValueError(f"warmup: model must be a config with a model_type, got {path}")
    told = data.pop("quantization_config", None)
    wanted = _conversion(told if isinstance(told, dict) else {}, scheme, sparsity)
    try:
        config = AutoConfig.for_model(data.pop("model_type"), **data).get_text_config(decoder=True)
        _shorten(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"warmup: model must be one that transformers can build, got {path}: {error}") from error
    if wanted is not None:
        _convert(model, *wanted)
    with all_on_meta():
        fusedops.patch(model)
    return model


def _conversion(told, scheme, sparsity):
    """(Scheme, names of modules that stay) by the arguments, else by what a checkpoint of ours tells; or None."""
    if scheme is not None or sparsity is not None:
        return found_scheme("warmup", scheme, None, sparsity), ()
    if told.get("quant_method") != METHOD:
        return None
    scheme = found_scheme("warmup", *(told.get(name) for name in ("scheme", "group_size", "sparsity")))
    return scheme, told.get("modules_to_not_convert") or ()


def _shorten(config):
    """Keep the first layers, up to one of each kind that the config names."""
    kinds = getattr(config, "layer_types", None) or []
    needed = max([LEAST_LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))])
    if needed < config.num_hidden_layers:
        config.num_hidden_layers = needed
        if kinds:
            config.layer_types = list(kinds[:needed])


def _convert(model, scheme, names):
    head = model.get_output_embeddings()
    left = {
        path
        for path, module in model.named_modules()
        if type(module) is torch.nn.Linear and (module is head or scheme.obstacle(module) is not None)
    }
    replace_linears(model, scheme, left | set(names), every=True)

"""Which linear layers of a model of transformers are quantised, and how they change places with ours."""

from torch import nn

from fusedops.nn import QuantizedLinear


def quantized_linears(model):
    """``(path, module)`` of all quantised layers; one that stands at several places comes with each."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            yield path, module


def left_alone(model, quantizer):
    """Names and patterns of the modules that stay: those asked for, and all that share a weight."""
    asked = quantizer.quantization_config.modules_to_not_convert
    names = set(quantizer.get_modules_to_not_convert(model, asked, model._keep_in_fp32_modules))
    pairs = getattr(model, "all_tied_weights_keys", {}).items()
    return names | {name.rpartition(".")[0] for pair in pairs for name in pair}


def replace_linears(model, scheme, left, every):
    """Put quantised layers without memory in the place of linear ones.

    Args:
        model: Of transformers, not loaded yet.
        scheme: A Scheme.
        left: Names and patterns of the modules that stay; those that the scheme does not take are added.
        every: Ask the scheme about no layer: a checkpoint has them quantised.

    Returns:
        Number of new modules.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    made = {}
    for path, linear in list(model.named_modules(remove_duplicate=False)):
        if type(linear) is not nn.Linear:
            continue
        # a checkpoint may have been saved with a head around this model
        names = path, f"{model.base_model_prefix}.{path}"
        if not all(should_convert_module(name, list(left)) for name in names):
            continue
        if not every and scheme.obstacle(linear) is not None:
            left.add(path)
            continue
        if linear not in made:
            made[linear] = scheme.module(
                linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype,
                **scheme.options,
            )  # fmt: skip
            if not every:  # until it is read; transformers 5.0 converts what it reads to the dtype that it finds
                made[linear].weight.data = made[linear].weight.data.to(linear.weight.dtype)
            made[linear]._hf_quantized_needs_local_tp = True  # under tensor parallelism it is given plain tensors
        model.set_submodule(path, made[linear])
    return len(made)


def restore_linears(model, dtype):
    """Put linear layers with dequantised weights in the place of quantised ones.

    Raises:
        NotImplementedError: a weight is offloaded or split.
    """
    places = list(quantized_linears(model))
    for path, module in places:
        if module.weight.is_meta or hasattr(module.weight, "to_local"):
            raise NotImplementedError(f"dequantize: all weights must be in memory, whole, got {path} elsewhere")
    made = {}
    for path, module in places:
        if module not in made:
            made[module] = module.to_linear(dtype)
            if hasattr(module, "_hf_hook"):
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(made[module], module._hf_hook)
        model.set_submodule(path, made[module])

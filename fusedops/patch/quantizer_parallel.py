"""Tensor parallelism of transformers on quantised layers: codes in shards, with the scales that belong to them."""

import torch

from fusedops.nn import Sparse24Linear
from fusedops.patch.quantizer_modules import quantized_linears

BY_ROWS, BY_COLUMNS = "colwise", "rowwise"  # transformers' names for a split of N and of K; suffixes may follow
WHOLE = "replicate"


def check_distributed(model, pre_quantized):
    """Refuse ways to distribute a model under which codes and scales would not stay together.

    Raises:
        NotImplementedError: weights would be quantised after they were split, or FSDP splits the parameters.
    """
    distributed = getattr(model.config, "distributed_config", None)
    if distributed is not None and not pre_quantized:
        raise NotImplementedError(
            "FusedOpsConfig: a distributed model must come from a checkpoint that is quantised already, as scales are "
            "of whole rows; quantise it in one process, save_pretrained() and load that"
        )
    if distributed is not None and distributed.dp_size > 1:
        raise NotImplementedError(f"FusedOpsConfig: a quantised model must not be split by FSDP, got {distributed}")


def add_scales_to_plan(model, plan):
    """Keep the scales of rows whole where the columns of their weights are split; groups of columns go with them.

    Raises:
        NotImplementedError: a distributed model splits a layer in another way than by rows or by columns, or a sparse
            one in any way.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    distributed = getattr(model.config, "distributed_config", None)
    asked = getattr(distributed, "tp_plan", None)
    styles = {**plan, **asked} if isinstance(asked, dict) else plan
    for path, module in quantized_linears(model):
        generic = replace_layer_number_by_wildcard(path)
        style = styles.get(generic, WHOLE)
        if isinstance(module, Sparse24Linear):
            if distributed is not None and style != WHOLE:
                raise NotImplementedError(f"FusedOpsConfig: a sparse layer must not be split, got {style} for {path}")
        elif style.startswith(BY_COLUMNS) and module.weight_scale.dim() == 1:
            plan[f"{generic}.weight_scale"] = WHOLE
        elif distributed is not None and not style.startswith((BY_ROWS, BY_COLUMNS, WHOLE)):
            raise NotImplementedError(
                f"FusedOpsConfig: tensor parallelism of a quantised layer must be {BY_ROWS} or {BY_COLUMNS}, "
                f"got {style} for {path}"
            )


def whole_state_dict(model):
    """The state of a model with float8 shards put together, None where there are none.

    transformers gathers all other shards when it saves; not every process group moves float8.
    """
    state = model.state_dict()
    split = {name: t for name, t in state.items() if hasattr(t, "to_local") and t.dtype == torch.float8_e4m3fn}
    for name, tensor in split.items():
        state[name] = tensor.view(torch.uint8).full_tensor().view(tensor.dtype)
    return state if split else None


def fit_local_shards(model):
    """Tell the layers that hold a part of the columns how many these are.

    Raises:
        NotImplementedError: columns that share a scale would be on two ranks, or this transformers does not ask a
            quantiser about its plan.
    """
    if (getattr(model, "_tp_size", None) or 1) > 1:
        _check_plans()
    for path, module in quantized_linears(model):
        if not hasattr(module.weight, "to_local"):
            continue
        local, whole = module.weight.to_local().shape[-1], module.weight.shape[-1]
        if local == whole:
            continue
        group = module.options.get("group_size")
        if group is not None and module.in_features % (group * model._tp_size):
            raise NotImplementedError(
                f"FusedOpsConfig: in_features of a layer whose columns are split must be a multiple of the group size "
                f"times the ranks, {group} * {model._tp_size}, got {module.in_features} for {path}"
            )
        module.in_features = local * 2 if module.weight.dtype == torch.uint8 else local


def _check_plans():
    try:
        import transformers.distributed.parallel_utils
    except ImportError:
        import transformers

        raise NotImplementedError(
            "FusedOpsConfig: tensor parallelism of quantised layers needs a newer transformers, which lets a quantiser "
            f"complete its plan, got {transformers.__version__}"
        ) from None

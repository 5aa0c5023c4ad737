"""The quantiser that transformers asks while it loads a checkpoint."""

import copy
import functools

import torch

from fusedops.nn import QuantizedLinear, Sparse24Linear
from fusedops.ops.compress_24 import prune_24
from fusedops.patch.quantizer import join
from fusedops.patch.quantizer_checks import check_files, check_loaded
from fusedops.patch.quantizer_modules import left_alone, quantized_linears, replace_linears, restore_linears
from fusedops.patch.quantizer_parallel import (
    add_scales_to_plan,
    check_distributed,
    fit_local_shards,
    whole_state_dict,
)


class FusedOpsHfQuantizer:
    """What `transformers.quantizers.HfQuantizer` asks for; `quantizer_class` joins the two.

    Linear layers are replaced by ours, without memory, before the checkpoint is read. Each float weight is quantised
    as soon as it has been read, and dropped.
    """

    requires_calibration = False
    serialized_names = {"weight": ["weight", "weight_scale", "weight_zero", "metadata"]}

    def __init__(self, quantization_config, **options):
        super().__init__(copy.deepcopy(quantization_config), **options)  # names of one model are written into it
        self.scheme = self.quantization_config.found_scheme()
        self.problems = []  # with weights that were quantised

    def validate_environment(self, device_map=None, **options):
        """Refuse what would leave float weights where codes are expected."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places and not self.pre_quantized:
            raise NotImplementedError(
                "FusedOpsConfig: device_map must not send layers to the disk while they are quantised; "
                "save_pretrained() the quantised model first, and load that"
            )

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **options):
        check_distributed(model, self.pre_quantized)
        left = left_alone(model, self)
        made = replace_linears(model, self.scheme, left, every=self.pre_quantized)
        if not made:
            raise ValueError(
                "FusedOpsConfig: model must have linear layers to quantise, "
                f"got a {type(model).__name__} without, apart from {sorted(left)}"
            )
        self.quantization_config.modules_to_not_convert = sorted(left)
        check_files(model, self, checkpoint_files)
        return model

    def param_needs_quantization(self, model, param_name, **options):
        """Whether a tensor of a checkpoint is a float weight to quantise."""
        path, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    @property
    def quantized_element_size(self):
        """Bytes that an element of a weight to quantise will take; two codes of 4 bits are one element."""
        return 1

    def get_quantize_ops(self):
        """The conversion of weights."""
        return QuantizeWeights(self.problems)

    def update_parallel_plan(self, model, plan):
        """Complete a plan of tensor parallelism."""
        super().update_parallel_plan(model, plan)
        add_scales_to_plan(model, plan)

    def _process_model_after_weight_loading(self, model, **options):
        check_loaded(model, self)
        fit_local_shards(model)
        for _, module in quantized_linears(model):
            for name, parameter in module.named_parameters(recurse=False):
                if name != "bias":
                    parameter.requires_grad_(False)  # transformers sets it for everything in floating point
        return model

    def get_state_dict_and_metadata(self, model, *options):
        """What `save_pretrained` stores."""
        return whole_state_dict(model), {}

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        restore_linears(model, dtype)
        return model if dtype == model.dtype else model.to(dtype)

    def is_serializable(self):
        """Codes and scales are stored as the tensors they are."""
        return True

    @property
    def is_trainable(self):
        """Gradients reach inputs and biases, so adapters can be trained; codes and scales stay as they are."""
        return True

    @property
    def is_compileable(self):
        """The layers are operators that torch.compile knows."""
        return True


class QuantizeWeights:
    """What transformers calls with the weights that it has read."""

    def __init__(self, problems):
        self.problems = problems

    def convert(self, input_dict, model=None, **options):
        """``{name: weight}`` to ``{name: tensor}`` of its codes and scales."""
        found = {}
        for name, weight in input_dict.items():
            weight = weight[0] if isinstance(weight, list) else weight
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            expected = [module.out_features, module.in_features]
            if list(weight.shape) != expected:
                raise ValueError(f"FusedOpsConfig: {name} must have shape {expected}, got {list(weight.shape)}")
            if not bool(weight.isfinite().all()):
                self.problems.append(f"{name} with NaN or infinity")  # transformers would hide an error's message
            elif isinstance(module, Sparse24Linear):
                weight = prune_24(weight)
            parts = module.quantize_weight(weight, **module.options)
            found.update({f"{path}.{part}": tensor for part, tensor in parts.items()})
        return found


@functools.cache
def quantizer_class():
    """Our quantiser as a class of transformers."""
    from transformers.quantizers.base import HfQuantizer

    return join(FusedOpsHfQuantizer, HfQuantizer)

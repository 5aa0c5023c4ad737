"""What a checkpoint must hold for the quantised layers of a model; anything else is refused before the model runs."""

from dataclasses import dataclass

import torch

from fusedops._core.checks import FLOATS
from fusedops.patch.quantizer_modules import quantized_linears

PARTS = ("weight_scale", "weight_zero", "input_scale", "metadata")  # of a quantised layer alone
SHOWN = 4  # of the problems found
DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@dataclass(frozen=True)
class Wanted:
    """Shape and dtypes of a tensor; of several dtypes the first is the layer's, and the others are converted to it."""

    shape: tuple
    dtypes: tuple

    def problem(self, name, shape, dtype):
        """What is wrong with a tensor, or None."""
        if tuple(shape) == self.shape and dtype in self.dtypes:
            return None
        return f"{name} is {_describe(shape, dtype)}, not {_describe(self.shape, self.dtypes[0])}"


def check_files(model, quantizer, files):
    """Compare the headers of the files with the layers that were put into a model, before a tensor is read.

    A weight that no file has under its name is left to `check_loaded`: transformers may make it of other tensors.

    Raises:
        ValueError: a shape or dtype is not what the metadata says, a scale is missing or too many, or a quantised
            checkpoint is not of safetensors.
    """
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        if quantizer.pre_quantized:
            found = ", ".join(map(str, files)) if files else "tensors in memory"
            raise ValueError(f"FusedOpsConfig: a quantised checkpoint must be of safetensors files, got {found}")
        return
    wanted = {}
    for path, module in quantized_linears(model):
        wanted |= {f"{path}.{name}": tensor for name, tensor in _wanted(module, quantizer.pre_quantized).items()}
    problems, seen = [], set()
    modules, known = dict(model.named_modules(remove_duplicate=False)), model.state_dict()
    for name, key, shape, dtype in _stored(model, quantizer, files):
        seen.add(name)
        path, _, part = name.rpartition(".")
        if name in wanted:
            problems.append(wanted[name].problem(key, shape, dtype))
        elif part in PARTS and path in modules and name not in known:
            problems.append(f"{key}, which its layer does not have")
    for name in wanted:
        if name not in seen and f"{name.rpartition('.')[0]}.weight" in seen:
            problems.append(f"{name} is missing")
    _refuse(quantizer, problems)


def check_loaded(model, quantizer):
    """Look at every parameter of the quantised layers when all has been loaded.

    Raises:
        ValueError: a parameter was not in the checkpoint, or has another shape or dtype than its layer; or a weight
            that was quantised held NaN or infinity.
    """
    problems = list(quantizer.problems)
    for path, module in quantized_linears(model):
        for name, wanted in _wanted(module, quantized=True).items():
            parameter = getattr(module, name)
            if parameter.is_meta:  # offloaded: it comes with the call that needs it
                continue
            loaded = getattr(parameter, "_is_hf_initialized", False)
            problem = wanted.problem(f"{path}.{name}", parameter.shape, parameter.dtype)
            problems.append(problem if loaded else f"{path}.{name} is missing")
    _refuse(quantizer, problems)


def _wanted(module, quantized):
    """``{name: Wanted}`` of what a checkpoint must hold for a layer."""
    sizes = module.in_features, module.out_features
    found = {}
    if quantized:
        for name, (shape, dtype) in module.layout(*sizes, module.dtype, **module.options).items():
            found[name] = Wanted(shape, (dtype,) if name in module.KEPT else (dtype, *FLOATS))
    else:
        found["weight"] = Wanted(sizes[::-1], (module.dtype, *FLOATS))
    if module.bias is not None:
        found["bias"] = Wanted(sizes[1:], (module.dtype, *FLOATS))
    return found


def _stored(model, quantizer, files):
    """``(name in the model, name in the file, shape, dtype)`` of the tensors that the model takes as they are."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    conversions = get_model_conversion_mapping(model, None, quantizer)
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]
    state = model.state_dict()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
                if pattern is None:
                    header = opened.get_slice(key)
                    yield name, key, tuple(header.get_shape()), DTYPES.get(header.get_dtype(), header.get_dtype())


def _describe(shape, dtype):
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _refuse(quantizer, problems):
    problems = [problem for problem in problems if problem is not None]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        what = "what its metadata says" if quantizer.pre_quantized else "the weights to quantise"
        raise ValueError(
            f"FusedOpsConfig: the checkpoint must hold {what} ({quantizer.scheme.name!r}), got "
            f"{'; '.join(problems[:SHOWN])}{more}"
        )

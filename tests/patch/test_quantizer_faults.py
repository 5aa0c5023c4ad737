"""Checkpoints that do not hold what they say are refused, by name, before anything has run."""

import shutil

import pytest
import torch

from fusedops import counters
from fusedops.patch import FusedOpsConfig
from tests.patch.quantized_checkpoints import edit, load, save_tiny

transformers = pytest.importorskip("transformers")

MLP = "model.layers.0.mlp.up_proj"  # [96, 64]
CODES, SCALE, ZERO = f"{MLP}.weight", f"{MLP}.weight_scale", f"{MLP}.weight_zero"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{scheme: folder} of checkpoints, and that of floats under None."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {None: save_tiny(folder / "floats", "qwen2")}
    for scheme in ("int8", "int4-weight-only"):
        found[scheme] = folder / scheme
        load(found[None], scheme).save_pretrained(found[scheme])
    return found


def put(name, make):
    """A change of one tensor."""

    def change(tensors):
        tensors[name] = make(tensors[name])

    return change


def drop(name):
    return lambda tensors: tensors.pop(name)


QUANTISED = {
    "float8 where int8 is said": ("int8", put(CODES, lambda t: t.to(torch.float8_e4m3fn)), {}, r"float8_e4m3fn .*int8"),
    "int8 where float8 is said": ("int8", None, {"quantization": {"scheme": "fp8"}}, r"int8 \[1, .*not float8_e4m3fn"),
    "int8 where 4 bits are said": (
        "int8", None, {"quantization": {"scheme": "int4-weight-only", "group_size": 32}}, r"int8 \[1, .*not uint8",
    ),
    "4 bits where int8 is said": (
        "int4-weight-only", None, {"quantization": {"scheme": "int8", "group_size": None}}, r"uint8 \[1, .*not int8",
    ),
    "float weight": ("int8", put(CODES, lambda t: t[0].float()), {}, r"float32 \[96, 64\], not int8 \[1, 96, 64\]"),
    "codes without the leading 1": ("int8", put(CODES, lambda t: t[0]), {}, r"int8 \[96, 64\], not int8 \[1, 96, 64\]"),
    "too few rows": ("int8", put(CODES, lambda t: t[:, :-1]), {}, r"int8 \[1, 95, 64\], not int8 \[1, 96, 64\]"),
    "K = 0": ("int8", put(CODES, lambda t: t[..., :0]), {}, r"int8 \[1, 96, 0\], not int8 \[1, 96, 64\]"),
    "K = 9": ("int8", put(CODES, lambda t: t[..., :9]), {}, r"int8 \[1, 96, 9\], not int8 \[1, 96, 64\]"),
    "columns and rows swapped": ("int8", put(CODES, lambda t: t.mT), {}, r"int8 \[1, 64, 96\], not int8 \[1, 96, 64\]"),
    "another width of the model": ("int8", None, {"intermediate_size": 128}, r"int8 \[1, 96, 64\], not int8 \[1, 128,"),
    "scale one too short": ("int8", put(SCALE, lambda t: t[1:]), {}, r"weight_scale is float32 \[95\], not .* \[96\]"),
    "one scale": ("int8", put(SCALE, lambda t: t[0]), {}, r"weight_scale is float32 \[\], not float32 \[96\]"),
    "scale of 16 bits": ("int8", put(SCALE, lambda t: t.bfloat16()), {}, r"scale is bfloat16 \[96\], not float32"),
    "scale of integers": ("int4-weight-only", put(SCALE, lambda t: t.int()), {}, r"weight_scale is I32 \[96, 2\], not"),
    "no scale": ("int8", drop(SCALE), {}, r"up_proj\.weight_scale is missing"),
    "no zero": ("int4-weight-only", drop(ZERO), {}, r"up_proj\.weight_zero is missing"),
    "no codes": ("int8", drop(CODES), {}, r"up_proj\.weight is missing"),
    "no bias": ("int8", drop("model.layers.0.self_attn.q_proj.bias"), {}, r"q_proj\.bias is missing"),
    "neither codes nor scale": ("int8", lambda t: [t.pop(CODES), t.pop(SCALE)], {}, r"weight is missing; .*scale is"),
    "another group size": ("int4-weight-only", None, {"quantization": {"group_size": 64}}, r"\[96, 2\], not .* 1\]"),
    "a scale of inputs": (
        "int8",
        lambda tensors: tensors.update({f"{MLP}.input_scale": torch.tensor(0.1)}),
        {},
        "input_scale, which its layer does not have",
    ),
    "codes of a layer that is said to stay": (
        "int8", None, {"quantization": {"modules_to_not_convert": ["lm_head", MLP]}}, "weight_scale, which its layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_checkpoint(case, ignore, saved, tmp_path):
    """Also where transformers is told to initialise what does not fit."""
    scheme, change, config, message = QUANTISED[case]
    folder = tmp_path / "damaged"
    shutil.copytree(saved[scheme], folder)
    edit(folder, change, **config)
    with pytest.raises(ValueError, match=f"FusedOpsConfig: the checkpoint must hold what .*{message}"):
        load(folder, ignore_mismatched_sizes=ignore)
    assert not counters()


FLOATS = {
    "too few columns": (put(CODES, lambda t: t[:, :-1]), r"float32 \[96, 63\], not float32 \[96, 64\]"),
    "codes of another tool": (put(CODES, lambda t: t.to(torch.int8)), r"int8 \[96, 64\], not float32 \[96, 64\]"),
    "no weight": (drop(CODES), r"up_proj\.weight is missing"),
    "NaN": (put(CODES, lambda t: t.masked_fill(torch.arange(64) == 3, torch.nan)), "weight with NaN or infinity"),
    "infinity": (put(CODES, lambda t: t.masked_fill(torch.arange(64) == 3, torch.inf)), "weight with NaN or infinity"),
}


@pytest.mark.parametrize("case", FLOATS)
def test_a_float_checkpoint(case, saved, tmp_path):
    change, message = FLOATS[case]
    folder = tmp_path / "damaged"
    shutil.copytree(saved[None], folder)
    edit(folder, change)
    with pytest.raises(ValueError, match=f"FusedOpsConfig: the checkpoint must hold the weights .*{message}"):
        load(folder, "int8", ignore_mismatched_sizes=True)


def test_messages_stay_short(saved, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved["int8"], folder)
    edit(folder, intermediate_size=128)
    with pytest.raises(ValueError, match=r"up_proj.*; and \d+ more$|mlp.*; and \d+ more$"):
        load(folder)


def test_files_that_are_not_safetensors(saved, tmp_path):
    """Floats may come from torch.save; codes may not, nor from memory."""
    from safetensors.torch import load_file

    for name, scheme in (("floats", None), ("codes", "int8")):
        shutil.copytree(saved[scheme], tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        (tmp_path / name / "model.safetensors").unlink()
    model = load(tmp_path / "floats", "int8")
    with pytest.raises(ValueError, match=r"must be of safetensors files, got .*pytorch_model\.bin"):
        load(tmp_path / "codes")
    config = transformers.AutoConfig.from_pretrained(saved["int8"])
    with pytest.raises(ValueError, match="must be of safetensors files, got tensors in memory"):
        type(model).from_pretrained(None, config=config, state_dict=tensors)
    tensors = torch.load(tmp_path / "floats" / "pytorch_model.bin")
    tensors[CODES] = tensors[CODES][:, :-1]
    torch.save(tensors, tmp_path / "floats" / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path / "floats", "int8")


def test_an_entry_of_a_later_release(saved, tmp_path):
    """What a checkpoint says and we do not know might change what its codes mean."""
    shutil.copytree(saved["int8"], tmp_path / "later")
    edit(tmp_path / "later", quantization={"rotation": "hadamard"})
    with pytest.raises(TypeError, match="rotation"):
        load(tmp_path / "later")


def test_another_config_for_a_quantised_checkpoint(saved):
    """What a checkpoint says counts; transformers warns."""
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            saved["int8"], quantization_config=FusedOpsConfig("fp8")
        )
    assert model.config.quantization_config.scheme == "int8"

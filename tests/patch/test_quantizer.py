"""Models that transformers quantises while it loads them: the values, what is saved, and what works with them."""

import copy
import json
import pickle
import weakref

import pytest
import torch
from torch import nn

from fusedops import quantize_
from fusedops.convert.schemes import find_scheme
from fusedops.nn import QuantizedLinear, WeightOnlyLinear
from fusedops.patch import FusedOpsConfig, patch
from fusedops.patch.quantizer_loading import QuantizeWeights
from tests.patch.engine import alone, prompts, together
from tests.patch.quantized_checkpoints import SCHEMES, edit, linears, load, quantized, same_tensors, save_tiny
from tests.patch.tiny_models import _SHAPE, fill, logits, tokens

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A float32 checkpoint of a llama."""
    return save_tiny(tmp_path_factory.mktemp("floats"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loading_saving_and_loading_again(scheme, floats, tmp_path):
    """Bit for bit what quantising the loaded model gives, also after a way through files."""
    model = load(floats, scheme)
    expected = quantized(load(floats), scheme)
    assert same_tensors(model, expected) and len(linears(model)) == 14
    out = logits(model, tokens())
    assert torch.equal(out, logits(expected, tokens()))

    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_tensors(again, model) and torch.equal(logits(again, tokens()), out)
    assert again.config.quantization_config == model.config.quantization_config
    assert not any(module.weight.requires_grad for module in linears(again).values())
    assert not any(module.weight_scale.requires_grad for module in linears(again).values())


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["int8", "fp8-weight-only"])
def test_dtypes(scheme, dtype, tmp_path):
    """The weight is quantised from the dtype that was asked for, not from the file's."""
    save_tiny(tmp_path / "floats", dtype=torch.bfloat16)
    model = load(tmp_path / "floats", scheme, dtype=dtype)
    expected = quantized(load(tmp_path / "floats", dtype=dtype), scheme)
    assert same_tensors(model, expected)
    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised", dtype=dtype)
    assert same_tensors(again, model) and torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    ("family", "options", "number"),
    [
        ("llama", {"tie_word_embeddings": True}, 14),
        ("qwen2", {}, 14),  # biases
        ("phi3", {}, 8),  # q, k and v in one, gate and up in one
        ("gemma2", {}, 14),
        ("mixtral", {}, 8),  # experts are no linear layers
        ("hrm_text", {}, 32),  # several weights in one tensor of the file
    ],
)
def test_families(family, options, number, tmp_path):
    if family == "hrm_text":
        if not hasattr(transformers, "HrmTextConfig"):
            pytest.skip("transformers has no such family yet")
        model = transformers.AutoModelForCausalLM.from_config(transformers.HrmTextConfig(**_SHAPE))
        fill(model).save_pretrained(tmp_path / "floats")
    else:
        save_tiny(tmp_path / "floats", family, **options)
    model = load(tmp_path / "floats", "int4-weight-only")
    assert len(linears(model)) == number and type(model.lm_head) is nn.Linear
    assert same_tensors(model, quantized(load(tmp_path / "floats"), "int4-weight-only"))
    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised")
    assert same_tensors(again, model) and torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_a_model_after_quantize_(floats, tmp_path):
    """With a config that says what was done, it is saved and loaded too: the way for smoothed activations."""
    model = load(floats)
    quantize_(model, "int8", skip=("lm_head", "down_proj"), calibration=[tokens(), tokens(seed=1)])
    model.config.quantization_config = FusedOpsConfig("int8", modules_to_not_convert=["lm_head", "down_proj"])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same_tensors(again, model) and torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_one_float_weight_at_a_time(floats, monkeypatch):
    """The float weight of a layer is gone when that of the next is read."""
    before, convert = [], QuantizeWeights.convert

    def watched(self, input_dict, **options):
        assert [ref for ref in before if ref() is not None] == []
        (weights,) = input_dict.values()
        before.append(weakref.ref(weights[0]))
        return convert(self, input_dict, **options)

    monkeypatch.setattr(QuantizeWeights, "convert", watched)
    load(floats, "int8")
    assert len(before) == 14


def test_shards(floats, tmp_path):
    """Codes and scales of a layer may be in different files."""
    model = load(floats, "int4-weight-only")
    model.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    again = load(tmp_path)
    assert same_tensors(again, model)


@pytest.mark.parametrize("names", [None, []])
def test_tied_weights_stay(names, tmp_path):
    """A head that shares its weight with the embedding is left alone, whatever is asked for."""
    save_tiny(tmp_path / "floats", tie_word_embeddings=True)
    model = load(tmp_path / "floats", FusedOpsConfig("int8", modules_to_not_convert=names))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised")
    assert again.lm_head.weight is again.model.embed_tokens.weight and same_tensors(again, model)


def test_modules_to_not_convert(floats, tmp_path):
    """Names, ends of names and patterns; a checkpoint remembers them, and the config that was given does not change."""
    config = FusedOpsConfig(
        "int8", modules_to_not_convert=["model.layers.0.mlp", "q_proj", r"model\.layers\.1\..*up.*"]
    )
    before = config.to_dict()
    model = transformers.LlamaForCausalLM.from_pretrained(floats, quantization_config=config)  # it makes no copy itself
    left = set(linears(model, nn.Linear))
    layer = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert left == {*layer, *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)), "model.layers.1.mlp.up_proj"}
    assert isinstance(model.lm_head, QuantizedLinear)  # an own list replaces the default
    assert config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert same_tensors(load(tmp_path), model)


def test_layers_that_would_not_shrink_stay(tmp_path):
    """Narrow ones, whose scales take what the codes save; a checkpoint is read as it was written, in any dtype."""
    save_tiny(tmp_path / "floats", hidden_size=4, head_dim=2, num_attention_heads=2)
    scheme = find_scheme("test", "int8")
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        model = load(tmp_path / "floats", "int8", dtype=dtype)
        left = linears(model, nn.Linear)
        assert all(scheme.obstacle(linear) for path, linear in left.items() if path != "lm_head")
        assert len(left) == (13 if dtype == torch.bfloat16 else 1)
        model.save_pretrained(tmp_path / str(dtype))
        assert same_tensors(load(tmp_path / str(dtype), dtype=dtype), model)
        assert linears(load(tmp_path / str(dtype), dtype=other), nn.Linear).keys() == left.keys()


def test_group_size(floats, tmp_path):
    model = load(floats, FusedOpsConfig("int8-weight-only", group_size=64))
    assert model.model.layers[0].mlp.down_proj.weight_scale.shape == (64, 2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["group_size"] == 64
    assert same_tensors(load(tmp_path), model)


def test_without_its_head(floats, tmp_path):
    """The decoder alone, from the checkpoint of the whole model."""
    model = load(floats, FusedOpsConfig("int8", modules_to_not_convert=["lm_head", "model.layers.0.mlp.up_proj"]))
    model.save_pretrained(tmp_path)
    decoder = transformers.AutoModel.from_pretrained(tmp_path)
    assert same_tensors(decoder, model.model)


def test_dequantize(floats, tmp_path):
    """Linear layers again, with the weights that the codes stand for; saved, they are anybody's checkpoint."""
    model = load(floats, "int8-weight-only")
    out, weights = logits(model, tokens()), {path: module.dequantize() for path, module in linears(model).items()}
    model.dequantize()
    assert not linears(model) and not hasattr(model.config, "quantization_config")
    assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in weights.items())
    torch.testing.assert_close(logits(model, tokens()), out, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert same_tensors(load(tmp_path), model)

    half = load(floats, "int8-weight-only").dequantize(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_maps(device_map, floats):
    pytest.importorskip("accelerate")
    assert same_tensors(load(floats, "int8", device_map=device_map), load(floats, "int8"))


def test_layers_on_the_disk(floats, tmp_path):
    """A quantised checkpoint may stay there; weights cannot be quantised on the way to it."""
    pytest.importorskip("accelerate")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    options = {"device_map": {**places, "model.rotary_emb": "cpu", "model.layers.1": "disk"}}
    options["offload_folder"] = tmp_path / "offloaded"
    with pytest.raises(NotImplementedError, match="device_map must not send layers to the disk"):
        load(floats, "int8", **options)
    model = load(floats, "int8")
    model.save_pretrained(tmp_path / "quantised")
    offloaded = load(tmp_path / "quantised", **options)
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(offloaded, tokens()), logits(model, tokens()))
    with pytest.raises(NotImplementedError, match="dequantize: all weights must be in memory"):
        offloaded.dequantize()
    edit(tmp_path / "quantised", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale is missing"):
        load(tmp_path / "quantised", **options)


def test_patched_and_served(floats):
    """Patching, generation and continuous batching take a quantised model as any other."""
    model, inputs = load(floats, "int8-weight-only"), prompts((3, 12))
    out, expected = logits(model, tokens()), alone(model, inputs, 6)
    handle = patch(model)
    assert len(handle.report.replaced) > 0
    assert alone(model, inputs, 6) == expected
    from fusedops.patch import continuous

    if not continuous.unsupported():
        assert together(model, inputs, 6) == expected
    handle.undo()
    assert torch.equal(logits(model, tokens()), out)


@pytest.mark.parametrize("scheme", ["int8", "int4-weight-only"])
def test_compiled(scheme, floats):
    """The layers are traced whole, as the quantiser says to `generate`."""
    model = load(floats, scheme)
    assert model.hf_quantizer.is_compileable
    layer = model.model.layers[0].mlp
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_gradients_pass_through(tmp_path):
    """What `is_trainable` promises: inputs and biases have the gradients of the dequantised model."""
    save_tiny(tmp_path, "qwen2")
    model, plain = load(tmp_path, "int8-weight-only"), load(tmp_path, "int8-weight-only").dequantize()
    assert model.hf_quantizer.is_trainable and not model.hf_quantizer.is_qat_trainable
    gradients = []
    for one in (model, plain):
        embedded = one.get_input_embeddings()(tokens()).detach().requires_grad_()
        one(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append((embedded.grad, one.model.layers[0].self_attn.q_proj.bias.grad))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.weight.grad is None


def test_copies(floats):
    """Of a config, its pickle, and of a model with its quantiser."""
    config = FusedOpsConfig("int4-weight-only", 64, ["lm_head"])
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), type(config).from_dict(config.to_dict())):
        assert other == config and other is not config and isinstance(other, FusedOpsConfig)
    assert config != FusedOpsConfig("int4-weight-only", 32, ["lm_head"])
    model = load(floats, "int8")
    assert torch.equal(logits(copy.deepcopy(model), tokens()), logits(model, tokens()))


def test_what_transformers_marks_stays_marked():
    """int8 codes that lie badly for a CPU are copied when a layer gets them; `check_loaded` looks for the mark."""
    layer = WeightOnlyLinear(64, 96)
    parameter = nn.Parameter(torch.zeros(96 * 64 + 1, dtype=torch.int8)[1:].view(1, 96, 64), requires_grad=False)
    parameter._is_hf_initialized = True
    layer.weight = parameter
    assert layer.weight.data_ptr() != parameter.data_ptr() and layer.weight._is_hf_initialized


def test_a_model_without_linear_layers(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FusedOpsConfig: model must have linear layers to quantise"):
        load(tmp_path, "int8")


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "FusedOpsConfig: scheme must be one of .*'int8'.*, got 'int3'", {"scheme": "int3"}),
        (ValueError, "FusedOpsConfig: group_size must be None for 'int8'", {"scheme": "int8", "group_size": 32}),
        (ValueError, "group_size must be .*, got 48", {"scheme": "int4-weight-only", "group_size": 48}),
        (TypeError, "must be None or a list of names, got 'q'", {"scheme": "int8", "modules_to_not_convert": "q"}),
        (ValueError, "quant_method must be 'fusedops', got 'gptq'", {"scheme": "int8", "quant_method": "gptq"}),
    ],
)
def test_wrong_options(error, message, options):
    with pytest.raises(error, match=message):
        FusedOpsConfig(**options)


def test_an_old_transformers(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(NotImplementedError, match="transformers must be 5.0 or newer, got 4.57.6"):
        FusedOpsConfig("int8")

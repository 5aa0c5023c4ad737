"""Quantised models, patched: fewer products and passes, and the very numbers of the same model without them."""

import copy
import io
import pickle

import pytest
import torch

import fusedops
from fusedops.nn import Int8Linear
from fusedops.patch import patch, unpatch
from fusedops.patch.instance import ATTRIBUTE, state_of
from tests.ops.common import using
from tests.patch.engine import alone, prompts, together
from tests.patch.quantized_models import Parallel, counted, looker, quantized
from tests.patch.test_undo import assert_same, snapshot
from tests.patch.tiny_models import FAMILIES, fill, logits, tiny, tokens, tower

pytest.importorskip("transformers")

# family -> int8_matmul and quantize_int8 left, of two layers; the others are as llama
SAME_AS_LLAMA = (8, 2)  # qkv, o, gate and up, down; only what attention gives is quantised by itself
EXPECTED = {
    "gemma": (8, 4),  # no quantising gelu_mul
    "gemma2": (8, 4),
    "gemma3": (8, 4),
    "glm": (8, 2),
    "gpt_oss": (4, 2),  # experts are no linears
    "mixtral": (4, 2),
    "qwen3_moe": (4, 2),
    "olmo2": (8, 6),  # no norm before the projections
}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_and_bits(family):
    """int8 sums are exact, so fusing must not change a bit; the counters say what is left of the calls."""
    model, ids = quantized(tiny(family)), tokens()
    stock = logits(model, ids)
    handle = patch(model, linear=False)
    expected, before = counted(model, ids)
    handle.undo()
    handle = patch(model)
    for _ in range(2):
        found, after = counted(model, ids)
        assert torch.equal(found, expected)
        assert (after["int8_matmul"], after["quantize_int8"]) == EXPECTED.get(family, SAME_AS_LLAMA)
    assert before["int8_matmul"] == before["quantize_int8"] > after["quantize_int8"]
    assert handle.fallbacks() == {}
    handle.undo()
    assert torch.equal(logits(model, ids), stock)


def test_kernels():
    """The same bits from the GPU's kernels, which get columns of wider matrices to rotate, attend and multiply."""
    model, ids = quantized(tiny("llama", num_hidden_layers=1)), tokens(1, 3)
    with using("triton"):
        handle = patch(model, linear=False)
        expected = logits(model, ids)
        handle.undo()
        patch(model)
        found, calls = counted(model, ids)
    assert torch.equal(found, expected) and {name for _, name in fusedops.counters()} == {"triton"}
    assert calls["int8_matmul"] == 4 and calls["quantize_int8"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "scheme"),
    [("qwen2", "int8"), ("phi3", "int8"), ("qwen3", "fp8"), ("gemma2", "int8-weight-only"),
     ("llama", "fp8-weight-only"), ("qwen2", "int4-weight-only")],
)  # fmt: skip
def test_schemes_verified(family, scheme, dtype):
    """Each linear against its own code on real activations, and the whole model."""
    report = patch(quantized(tiny(family, dtype), scheme), verify=True).report
    measured = {entry.kind: entry for entry in report.measured}
    assert measured["linear"].rms <= measured["linear"].rms_limit
    assert report.counts["linear"] == (6 if family == "phi3" else 10 if "weight" in scheme or "gemma" in family else 12)


def test_report_and_dry_run():
    model = quantized(tiny("llama"))
    before = snapshot(model)
    report = patch(model, dry_run=True).report
    assert_same(before, snapshot(model))
    assert "4 x linear     Int8Linear         -> int8_matmul of gate_proj, up_proj in one" in str(report)
    texts = {row.path: row.replacement for row in report.replaced}
    assert texts["model.layers.1.self_attn.k_proj"] == "int8_matmul of q_proj, k_proj, v_proj in one"
    assert texts["model.layers.1.mlp.down_proj"] == "int8_matmul of rows that come quantised"
    assert texts["model.layers.1.mlp"] == "silu_mul_quantized of gate_proj, up_proj for down_proj"
    assert texts["model.layers.0.input_layernorm"] == (
        "rms_norm_quantized(rounding='llama') for self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
    )
    assert texts["model.norm"] == "rms_norm(rounding='llama')"
    assert patch(model, linear=False, dry_run=True).report.counts["linear"] == 0
    assert patch(tiny("llama"), dry_run=True).report.counts["linear"] == 0


def test_family_of_nobody():
    """Names, classes and spellings that no list contains; one projection for q, k and v.

    torch's GELU by the error function has other bits for columns of a wider matrix, of which one row has none.
    """
    model = quantized(tower())
    for ids, tolerance in ((tokens(), 1e-5), (tokens(1, 1), 0)):
        handle = patch(model, linear=False)
        expected = logits(model, ids)
        handle.undo()
        handle = patch(model)
        found, calls = counted(model, ids)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert handle.report.counts["linear"] == 9
        assert (calls["int8_matmul"], calls["quantize_int8"], calls["rms_norm_quantized"]) == (12, 6, 1)
        handle.undo()


def _addresses(linears, name="weight"):
    return [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in (getattr(x, name) for x in linears)]


def _are_neighbours(linears, name="weight"):
    places = _addresses(linears, name)
    return all(end == start for (_, end), (start, _) in zip(places, places[1:], strict=False))


@pytest.mark.parametrize("scheme", ["int8", "int4-weight-only"])
def test_undo(scheme):
    """The same objects with the same values, in memory of their own again."""
    model, ids = quantized(tiny("qwen2"), scheme), tokens()
    before, expected = snapshot(model), logits(model, ids)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.model.layers[0].self_attn
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    names = [name for name, p in linears[0].named_parameters()]
    handle = patch(model)
    assert all(_are_neighbours(linears, name) for name in names)  # stored once: the parameters are parts of the whole
    logits(model, ids)
    handle.undo()
    assert_same(before, snapshot(model))
    assert not any(_are_neighbours(linears, name) for name in names)
    assert torch.equal(logits(model, ids), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name])
    handle.undo()
    patch(model).undo()


def test_copies_and_files():
    """A copy and a pickle are patched on their own and store every weight once; a state dict is what it was."""
    model, ids = quantized(tiny("llama")), tokens()
    state, plain_size = copy.deepcopy(model.state_dict()), len(pickle.dumps(model))
    stock = logits(model, ids)
    patch(model)
    expected = logits(model, ids)
    assert len(pickle.dumps(model)) < 1.1 * plain_size
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, calls = counted(again, ids)
        assert torch.equal(found, expected) and calls["int8_matmul"] == 8
        attention = again.model.layers[1].self_attn
        assert _are_neighbours((attention.q_proj, attention.k_proj, attention.v_proj))
        assert unpatch(again) > 11 and torch.equal(logits(again, ids), stock)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for found in (model.state_dict(), torch.load(file)):
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_safetensors(tmp_path):
    """save_file refuses tensors that share memory."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = quantized(tiny("llama"), "int8-weight-only")
    state = copy.deepcopy(model.state_dict())
    patch(model)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * sum(t.nbytes for t in state.values()) + 10_000
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights(assign):
    """A state dict that is loaded later counts, whether it is copied in or put in place of the parameters."""
    model, ids = quantized(tiny("llama")), tokens()
    other = quantized(tiny("llama"))
    for linear in other.modules():
        if isinstance(linear, Int8Linear):
            linear.weight_scale.mul_(torch.linspace(0.5, 1.5, linear.out_features))
    expected, state = logits(patch(other).model, ids), copy.deepcopy(other.state_dict())
    patch(model)
    assert not torch.equal(logits(model, ids), expected)
    model.load_state_dict(state, assign=assign)
    found, calls = counted(model, ids)
    assert torch.equal(found, expected) and calls["int8_matmul"] == 8


def test_another_dtype_and_place():
    """``model.to`` gives parameters new memory; they are brought together once more, but not for ever."""
    model, ids = quantized(tiny("qwen2")), tokens()
    handle = patch(model)
    model.to(torch.bfloat16)
    found, calls = counted(model, ids)
    assert calls["int8_matmul"] == 8
    handle.undo()
    patch(model, linear=False)
    assert torch.equal(found, logits(model, ids))
    unpatch(model)
    handle = patch(model)
    attention = model.model.layers[0].self_attn
    for _ in range(6):
        attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
        assert torch.equal(logits(model, ids), found)
    reason = "its parameters change their place again and again"
    assert handle.fallbacks()["model.layers.0.self_attn.k_proj", reason] == 2


def test_gradients():
    """With gradients each linear runs its own code; the biases learn as they did."""
    grads = []
    for fused in (False, True):
        model = quantized(tiny("qwen2")).train()
        patch(model, linear=fused)
        fusedops.reset_counters()
        model(tokens()).logits.square().mean().backward()
        assert fusedops.counters()["int8_matmul", "torch"] == 14
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("q_proj.bias" in name for name in grads[0])
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_compile():
    """The compiler sees the linears' own code."""
    model, x = looker(), torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = model(x)
        patch(model)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        assert state_of(model.ask).group._product is None


def test_export():
    """A trace without memory has no addresses to look at: it sees the linears' own code, and ordinary tensors."""
    torch.manual_seed(0)
    model, x = quantized(fill(Parallel().eval()), "fp8"), torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = logits(model, x)
        assert patch(model).report.counts["linear"] == 4
        program = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), expected)
        group = state_of(model.looking.ask).group
        assert group.apart == "" and group._product is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_inference_mode(mode):
    model, ids = quantized(tiny("llama")), tokens()
    patch(model)
    expected = logits(model, ids)
    with mode():
        fusedops.reset_counters()
        assert torch.equal(model(ids).logits, expected)
    assert fusedops.counters()["int8_matmul", "torch"] == 8 and fusedops.counters()["quantize_int8", "torch"] == 2


def test_autocast():
    model, ids = quantized(tiny("llama")), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(patch(model, linear=False).model, ids)
        unpatch(model)
        patch(model)
        found, calls = counted(model, ids)
        assert torch.equal(found, expected) and calls["int8_matmul"] == 8
    with torch.no_grad():
        x = torch.randn(2, 64)
        attention = model.model.layers[0].self_attn
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention.q_proj(x).dtype == torch.bfloat16
        assert attention.k_proj(x).dtype == torch.float32  # not what was laid aside inside


GENERATED = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", GENERATED)
def test_generate(way):
    model, ids = quantized(tiny("llama")), tokens()[: 1 if way == "lookup" else 2]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **GENERATED[way]}
    results = []
    for fused in (False, True):
        handle = patch(model, linear=fused)
        results.append(model.generate(ids, **options))
        handle.undo()
    assert torch.equal(*results)


def test_continuous_batching():
    from fusedops.patch import continuous

    if continuous.unsupported():
        pytest.skip(continuous.unsupported())
    model, inputs = quantized(tiny("llama")), prompts((3, 30, 9))
    handle = patch(model)
    expected = alone(model, inputs, 4)
    fusedops.reset_counters()
    assert together(model, inputs, 4) == expected and handle.fallbacks() == {}
    products, quantised = (fusedops.counters()[name, "torch"] for name in ("int8_matmul", "quantize_int8"))
    assert products == 4 * quantised  # of what attention gives


def test_no_activation_is_kept():
    """After a forward nothing waits with a group; a copy made in between carries no activation."""
    model, ids = quantized(tiny("llama")), tokens()
    patch(model)
    copies = []
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(attention.k_proj)))
    logits(model, ids)
    assert vars(copies[0])[ATTRIBUTE].group._product is None
    states = [state_of(module) for module in model.modules() if isinstance(module, Int8Linear)]
    groups = [state.group for state in states if state is not None]
    assert groups and all(group._product is None for group in groups)

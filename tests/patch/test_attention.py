"""Models with our attention: the same logits and tokens as with eager attention, however the model is called."""

import contextlib
import functools
import inspect

import pytest
import torch

import fusedops
from fusedops._core import env
from fusedops.patch import masks, patch
from fusedops.testing.accuracy import Budget, errors
from tests.patch.tiny_models import logits, tiny, tokens

transformers = pytest.importorskip("transformers")

# with a window of 8, with soft caps, with sinks, and plain
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_oss")
WINDOWED = ("mistral", "gemma2", "gpt_oss")  # every layer; first layer, with a soft cap; first layer, with sinks
LENGTH = 20  # longer than every window, and than a window and a chunk

only_attention = functools.partial(patch, norm=False, mlp=False, rotary=False)


def assert_close(found, expected, number=2):
    """Within the budget of as many independently rounded modules."""
    measured, budget = errors(found, expected.double()), Budget.for_dtype(expected.dtype)
    assert measured.rms <= budget.rms * number**0.5 and measured.peak <= budget.peak * number**0.5, measured


def assert_fused(handle, calls=None):
    """Every attention ran as our operator, and nothing else did."""
    assert handle.fallbacks() == {}
    counts = {name: number for (name, _), number in fusedops.counters().items()}
    assert counts.keys() == {"attention"} and calls in (None, counts["attention"]), counts


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    model, ids = tiny(family), tokens(length=LENGTH)
    expected = logits(model, ids)
    handle = only_attention(model)
    assert handle.report.counts == {"attention": 2, "norm": 0, "mlp": 0, "rotary": 0, "residual": 0, "linear": 0}
    assert_close(logits(model, ids), expected)
    assert_fused(handle, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens_after_a_long_prompt(family):
    model, ids = tiny(family), tokens(1, LENGTH)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = model.generate(ids, **options)
    handle = only_attention(model)
    assert model.generate(ids, **options).tolist() == expected.tolist()
    assert len(set(expected[0, LENGTH:].tolist())) >= 6, "tokens that hardly change test nothing"
    assert_fused(handle, 2 * 64)


def caches(model, length):
    """Every cache that transformers makes for a model: growing, cut at the window, static, static and cut."""
    yield transformers.DynamicCache()
    yield transformers.DynamicCache(config=model.config)
    yield transformers.StaticCache(config=model.config, max_cache_len=length + 5)


@pytest.mark.parametrize("sizes", [[1] * LENGTH, [13, *[1] * 7], [7, 6, 7], [3, 1, 9, 2, 5], [LENGTH]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_agree_at_every_position(family, sizes):
    """Token by token, in chunks of every kind, and at once: window and soft cap hold where a cache is cut, too."""
    model, ids = tiny(family), tokens(length=LENGTH)
    expected = logits(model, ids)
    handle = only_attention(model)
    for cache in caches(model, LENGTH):
        outs, start = [], 0
        with torch.no_grad():
            for size in sizes:
                part = ids[:, start : start + size]
                outs.append(model(part, past_key_values=cache, use_cache=True).logits)
                start += size
        assert_close(torch.cat(outs, 1), expected)
    assert_fused(handle)


def padded(side, lengths=(LENGTH, 13, 1), width=LENGTH):
    """Token ids and mask of sequences of several lengths; "both" has padding at both ends."""
    ids, mask = tokens(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        mask[row, start : start + length] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding(family, side):
    """Each real token's logits are those of eager attention, and no mask is made dense."""
    model = tiny(family)
    ids, mask = padded("left" if side == "holes" else side)
    if side == "holes":
        mask[0, 3:5] = mask[1, 11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    call = functools.partial(model, ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        expected = call().logits
        handle = only_attention(model)
        with seen_masks(model) as seen:
            out = call().logits
    assert_close(out[mask.bool()], expected[mask.bool()])
    assert torch.isfinite(out).all()
    assert {mask.dtype for mask in seen} == {masks.SHORT}
    assert_fused(handle, 2)


@pytest.mark.parametrize("family", WINDOWED)
def test_padding_on_the_triton_kernels(family):
    """What a GPU would run, interpreted: a padded prefill, and decoding with caches that grow and that do not."""
    model = tiny(family)
    ids, mask = padded("left")
    longer = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
    found = []
    for backend in ("auto", "triton"):
        handle = only_attention(model) if backend == "triton" else None
        fusedops.reset_counters()
        for cache in list(caches(model, LENGTH))[1:]:
            with torch.no_grad(), env.override("FUSEDOPS_BACKEND", backend):
                prompt = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
                step = model(ids[:, :1], attention_mask=longer, past_key_values=cache, use_cache=True).logits
            found.append(torch.cat((prompt[mask.bool()], step[:, 0])))
    for mine, stock in zip(found[2:], found[:2], strict=True):
        assert_close(mine, stock)
    assert handle.fallbacks() == {} and fusedops.counters() == {("attention", "triton"): 8}


@contextlib.contextmanager
def seen_masks(model):
    """The masks that reach the attentions of a model, which may be None."""
    seen, hooks = [], []
    for layer in model.model.layers:
        hook = functools.partial(lambda seen, module, args, kwargs: seen.append(kwargs["attention_mask"]), seen)
        hooks.append(layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True))
    yield seen
    for hook in hooks:
        hook.remove()


GENERATE = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False, "disable_compile": True},
    "no cache": {"use_cache": False, "do_sample": False},
    "chunked prefill": {"prefill_chunk_size": 6, "do_sample": False},
}


def generate(model, ids, options):
    """Token ids, as a list; where the model itself cannot generate so, there is nothing to compare."""
    try:
        return model.generate(ids, **options).tolist()
    except ValueError as refused:
        if model.config._attn_implementation == "eager":
            pytest.skip(f"transformers {transformers.__version__}: {refused}")
        raise


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_for_a_padded_batch(family, how):
    """Every way to generate, for sequences of several lengths, gives the tokens of eager attention."""
    model = tiny(family)
    ids, mask = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, **GENERATE[how]}
    found = []
    for patched in (False, True):
        handle = only_attention(model) if patched else None
        torch.manual_seed(0)
        found.append(generate(model, ids, options))
    assert found[0] == found[1]
    assert_fused(handle)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_speculation(family, how):
    """A few queries against a long past, and a cache that is cut back, also where it was cut at the window."""
    model, ids = tiny(family), tokens(1, 6).repeat(1, 4)
    assistant = tiny(family, num_hidden_layers=2)
    options = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": assistant}
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    expected = generate(model, ids, options)
    handles = [only_attention(model), only_attention(assistant)]
    assert generate(model, ids, options) == expected
    assert handles[0].fallbacks() == handles[1].fallbacks() == {}


@pytest.mark.parametrize("family", WINDOWED)
def test_masks_of_the_users(family):
    """Masks of four dimensions, boolean and additive, and packed sequences: dense, and as eager attention has them."""
    model, ids = tiny(family), tokens(length=12)
    dense = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    dense[0, :, 5:, 2] = dense[1, :, 7:, :7] = False
    additive = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    packed = torch.tensor([[*range(7), *range(5)], [*range(3), *range(9)]])
    calls = ({"attention_mask": additive}, {"position_ids": packed, "use_cache": False})
    with torch.no_grad():
        expected = [model(ids, **call).logits for call in calls]
        handle = only_attention(model)
        for call, truth in zip(calls, expected, strict=True):
            assert_close(model(ids, **call).logits, truth)
        assert_close(model(ids, attention_mask=dense).logits, expected[0])  # eager attention takes no boolean ones
    assert_fused(handle, 6)


def test_first_of_a_static_cache_is_cut_to_its_keys():
    """The keys that a static cache has not filled yet cost nothing in a prefill."""
    if "q_length == 1" not in inspect.getsource(transformers.masking_utils.create_causal_mask):
        pytest.skip(f"transformers {transformers.__version__} asks for masks of one shape in a prefill, too")
    model, ids = tiny("llama"), tokens(length=6)
    only_attention(model)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad(), seen_masks(model) as seen:
        model(ids, past_key_values=cache, use_cache=True)
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert [tuple(mask.shape) for mask in seen[:2]] == [(1, 0, 12, 6)] * 2
    assert [(mask.dtype, mask.shape[2:]) for mask in seen[2:]] == [(torch.bool, (1, 64))] * 2


def test_bidirectional_decoder():
    """A decoder whose config says that it is not causal."""
    model, ids = tiny("llama", is_causal=False), tokens()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        expected = [model(ids).logits, model(ids, attention_mask=mask).logits]
        only_attention(model)
        found = [model(ids).logits, model(ids, attention_mask=mask).logits]
    assert_close(found[0], expected[0])
    assert_close(found[1][mask.bool()], expected[1][mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_on_padded_sequences(family):
    """Loss and every gradient, of sinks too, where the padding is on the right."""
    model = tiny(family).train()
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for patched in (False, True):
        handle = only_attention(model) if patched else None
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (loss, stock), (patched_loss, gradients) = found
    assert patched_loss == pytest.approx(loss, rel=1e-6) and gradients.keys() == stock.keys()
    for name, gradient in gradients.items():
        assert (gradient - stock[name]).norm() <= 2e-5 * stock[name].norm() + 1e-9, name
    assert handle.fallbacks() == {}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_in_training_is_the_models_own(implementation):
    """The same random numbers as before patching, with padding; and the handle says what happened."""
    model = tiny("mistral", attention_dropout=0.3).train()
    model.set_attn_implementation(implementation)
    ids, mask = padded("left", (LENGTH, 13))
    outs = []
    for patched in (False, True):
        handle = only_attention(model) if patched else None
        torch.manual_seed(0)
        outs.append(model(ids, attention_mask=mask).logits.detach()[mask.bool()])
    assert torch.equal(*outs)
    assert [reason for _, reason in handle.fallbacks()] == ["dropout in training"] * 2
    model.eval()
    assert_close(logits(model, ids), tiny_logits("mistral", ids))


def tiny_logits(family, ids):
    return logits(tiny(family), ids)


def test_weights_that_are_asked_for():
    """output_attentions gives what eager attention gives, window, soft cap, sinks and padding included."""
    for family in WINDOWED:
        model = tiny(family)
        ids, mask = padded("right")
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, output_attentions=True).attentions
            handle = only_attention(model)
            found = model(ids, attention_mask=mask, output_attentions=True).attentions
        assert len(found) == len(expected) == 2
        for mine, stock in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, stock)
        assert {reason for _, reason in handle.fallbacks()} == {"the weights are asked for"}


def test_float64():
    model, ids = tiny("gemma2"), tokens()
    handle = only_attention(model)
    model.double()
    found = logits(model, ids)
    handle.undo()
    torch.testing.assert_close(found, logits(model, ids))
    assert found.dtype == torch.float64 and len(handle.fallbacks()) == 2


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_autocast(family):
    """Rotary leaves q and k wider than v; torch's attention would round them, and so do we."""
    model, ids = tiny(family), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model, ids)
        handle = only_attention(model)
        found = logits(model, ids)
    assert found.dtype == expected.dtype
    with torch.autocast("cpu", enabled=False):
        handle.undo()
        truth = logits(model, ids).double()
    mine, stock = errors(found, truth), errors(expected, truth)
    assert mine.rms <= 2 * stock.rms and mine.peak <= 2 * stock.peak
    assert_fused(handle, 2)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_compile(family):
    """Every attention is our operator, with no graph break and no recompilation that the stock model does not have."""
    model = tiny(family)
    ids, mask = padded("left")
    expected = [logits(model, tokens(length=length)) for length in (5, 9)]
    with torch.no_grad():
        expected_padded = model(ids, attention_mask=mask).logits
    counts = []
    for patched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if patched:
            only_attention(model)
        fusedops.reset_counters()
        compiled = torch.compile(model, backend="eager")
        found = [logits(compiled, tokens(length=length)) for length in (5, 9)]
        with torch.no_grad():
            found_padded = compiled(ids, attention_mask=mask).logits
        counters = torch._dynamo.utils.counters
        counts.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    torch._dynamo.reset()
    assert counts[1] <= counts[0] and counts[1][0] > 0
    for mine, stock in zip(found, expected, strict=True):
        assert_close(mine, stock)
    assert_close(found_padded[mask.bool()], expected_padded[mask.bool()])
    assert {name: calls for (name, _), calls in fusedops.counters().items()} == {"attention": 2 * 3}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_decoding(family):
    """generate compiles each decoding step with a static cache: one graph with our operator, whatever the length."""
    model = tiny(family)
    ids, mask = padded("left")
    compile_config = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # on a CPU, too
    options = {"attention_mask": mask, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    options |= {"cache_implementation": "static", "compile_config": compile_config}
    graphs, found = [], []
    for patched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        handle = only_attention(model) if patched else None
        found.append(generate(model, ids, options))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert found[0] == found[1] and 0 < graphs[1] <= graphs[0]
    assert_fused(handle, 2 * 10)

"""Paged caches in trouble: bad arguments, masks that pages cannot express, short pools, models that fail."""

import pytest
import torch

from fusedops import OutOfPages
from fusedops.patch import PagedCache, instance
from tests.patch.test_attention import assert_close, only_attention, padded
from tests.patch.tiny_models import tiny, tokens

transformers = pytest.importorskip("transformers")

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def run(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options).logits


def both(ids, calls, family="llama", **options):
    """Logits of the same calls with transformers' cache and eager attention, and with ours; and the handle."""
    model = tiny(family)
    cache, expected = transformers.DynamicCache(), []
    for start, stop, call in calls:
        expected.append(run(model, ids[:, start:stop], cache, **call))
    handle, cache, found = only_attention(model), PagedCache(model, num_pages=40, page_size=8, **options), []
    for start, stop, call in calls:
        found.append(run(model, ids[:, start:stop], cache, **call))
    return found, expected, handle, cache


CONSTRUCTOR = {
    "model_or_config must be a model of transformers or its config, got Linear": (TypeError, torch.nn.Linear(2, 2), {}),
    "dtype must be float16, bfloat16 or float32, got torch.float64": (TypeError, None, {"dtype": torch.float64}),
    "page_size must be 1 or a multiple of 8 up to 256, got 12": (ValueError, None, {"page_size": 12}),
    "num_pages must be a positive integer, got 0": (ValueError, None, {"num_pages": 0}),
    "model must be a decoder alone, got t5": (NotImplementedError, "T5Config", {}),
    "got latent attention": (NotImplementedError, "DeepseekV3Config", {}),
    "layers must be of .*, got linear_attention": (NotImplementedError, "Qwen3NextConfig", {}),
    r"all layers must have the same heads, got \[\(4, 256\), \(4, 512\)\]": (
        NotImplementedError,
        "Gemma4TextConfig",
        {},
    ),
}


@pytest.mark.parametrize("message", CONSTRUCTOR)
def test_constructor_refuses(message):
    error, made_for, options = CONSTRUCTOR[message]
    if isinstance(made_for, str):
        made_for = getattr(transformers, made_for)()
    with pytest.raises(error, match=f"Paged.*Cache: .*{message}"):
        PagedCache(tiny("llama").config if made_for is None else made_for, **{"num_pages": 4, **options})


def test_update_refuses():
    """Before anything is changed."""
    cache = PagedCache(tiny("llama"), num_pages=4, page_size=8)
    good = torch.zeros(1, 2, 3, 16)
    bad = {
        r"key_states must have shape \[B, 2, S, 16\], got \[1, 4, 3, 16\]": (ValueError, good.repeat(1, 2, 1, 1), good),
        "value_states must be torch.float32 as the cache is, got torch.bfloat16": (TypeError, good, good.bfloat16()),
        "value_states must be on cpu as the cache is, got meta": (ValueError, good, good.to("meta")),
        "key_states must not require a gradient": (RuntimeError, good.clone().requires_grad_(), good),
    }
    for message, (error, key, value) in bad.items():
        with pytest.raises(error, match=f"PagedCache: {message}"):
            cache.update(key, value, 0)
    assert cache.get_seq_length() == 0 and cache.stats().pages_used == 0
    cache.update(good, good, 0)
    with pytest.raises(ValueError, match="PagedCache: key_states must have the 1 rows of the cache, got 2; reset()"):
        cache.update(good.repeat(2, 1, 1, 1), good.repeat(2, 1, 1, 1), 0)
    with pytest.raises(NotImplementedError, match="all layers share pages"):
        cache.layers[0].crop(-1)
    assert not cache.is_compileable


def test_compiled_model():
    """Every layer breaks the graph, and the values are right."""
    model = tiny("llama", num_hidden_layers=1)
    ids, mask = padded("left", (20, 13))
    expected = run(model, ids, None, attention_mask=mask)[mask.bool()]
    handle = only_attention(model)
    torch._dynamo.reset()
    cache = PagedCache(model, num_pages=20, page_size=8)
    assert_close(run(torch.compile(model, backend="eager"), ids, cache, attention_mask=mask)[mask.bool()], expected)
    torch._dynamo.reset()
    assert cache.stats().tokens == 33 and handle.fallbacks() == {}


def test_model_in_half_precision_and_config():
    """The model's dtype; a config has one, too, and the pages of a copied config are gathered, not read."""
    model = tiny("llama", torch.bfloat16)
    only_attention(model)
    assert PagedCache(model, num_pages=4).pages.k.dtype == torch.bfloat16
    model = tiny("llama")
    for config in (model.config, type(model.config)(**model.config.to_dict())):
        cache = PagedCache(config, num_pages=4, dtype=torch.float32)
        run(model, tokens(1, 5), cache)
        assert cache.stats().tokens == 5


def test_attention_that_changes_keys_after_the_cache():
    """It computes with all keys, not with the new ones; the mask is not known by then, so padding is stored."""
    ids, mask = padded("left", (20, 13, 6))
    model = tiny("llama")
    options = {**OPTIONS, "attention_mask": mask}
    expected = model.generate(ids, **options).tolist()
    handle = only_attention(model)
    cache = PagedCache(model, num_pages=40, page_size=8)
    for layer in cache.layers[:1]:
        layer.update = lambda *states, update=layer.update: tuple(x * 1.0 for x in update(*states))
    assert model.generate(ids, past_key_values=cache, **options).tolist() == expected
    assert cache.stats().tokens == 3 * 25
    assert {reason for _, reason in handle.fallbacks()} == {"a mask that hides tokens of the cache"}


def test_attention_that_changes_values_alone():
    ids = tokens(2, 12)
    model = tiny("llama")
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS).tolist()
    handle = only_attention(model)
    cache = PagedCache(model, num_pages=40, page_size=8)
    changed = cache.layers[1]
    changed.update = lambda *states, update=changed.update: (lambda key, value: (key, value * 1.0))(*update(*states))
    assert (
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **OPTIONS).tolist() == expected
    )
    assert {reason for _, reason in handle.fallbacks()} == {"keys and values that were changed after the cache"}


def test_what_was_handed_out_and_never_read_is_written():
    """By the next layer, by the next forward, and before the batch changes."""
    model = tiny("llama")
    only_attention(model)
    cache = PagedCache(model, num_pages=40, page_size=8)
    states = torch.randn(4, 2, 2, 5, 16)
    for layer in (0, 1):
        cache.update(*states[2 * layer : 2 * layer + 2], layer)
    cache.reorder_cache(torch.tensor([1, 0]))
    for layer in (0, 1):
        key, value = cache.update(*states[2 * layer : 2 * layer + 2], layer)
        for found, new in ((key, states[2 * layer]), (value, states[2 * layer + 1])):
            assert torch.equal(found + 0, torch.cat((new.flip(0), new), 2))
    with pytest.raises(RuntimeError, match="must be read before the cache changes"):
        cache.crop(-1)
        key.new._gathered = None
        key + 0


def test_modules_that_are_not_replaced():
    """The config names our function, and one module keeps its own: it gets what other caches give."""
    ids, mask = padded("left", (20, 13, 6))
    model = tiny("gemma2")
    options = {**OPTIONS, "attention_mask": mask}
    expected = model.generate(ids, **options).tolist()
    only_attention(model)
    del model.model.layers[0].self_attn.__dict__[instance.ATTENTION_ATTRIBUTE]
    cache = PagedCache(model, num_pages=40, page_size=8)
    assert model.generate(ids, past_key_values=cache, **options).tolist() == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_masks_of_the_users(family):
    """Dense masks, boolean and additive, in the middle of a sequence; holes that come later."""
    ids = tokens(2, 24)
    dense = torch.ones(2, 1, 4, 16, dtype=torch.bool).tril(12)
    dense[0, :, 1:, 3] = False
    additive = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    holes = torch.ones(2, 20, dtype=torch.long)
    holes[0, 5:9] = 0
    calls = [
        (0, 12, {}),
        (12, 16, {"attention_mask": additive}),
        (16, 20, {"attention_mask": holes}),
        (20, 24, {}),
    ]
    found, expected, handle, cache = both(ids, calls, family)
    for mine, stock in zip(found, expected, strict=True):
        assert_close(mine, stock)
    reasons = {"a dense mask over pages": 2, "a mask that hides tokens of the cache": 2}
    counts = {}
    for (_, reason), number in handle.fallbacks().items():
        counts[reason] = counts.get(reason, 0) + number
    assert counts == reasons
    assert cache.stats().tokens == 48


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_holes_of_a_prompt(family):
    """Padding in the middle takes no page either; windows across it are gathered."""
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, 3:5] = mask[1, 11] = mask[2, :9] = mask[2, 12] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    longer = torch.cat((mask, torch.ones(3, 4, dtype=torch.long)), 1)
    calls = [
        (0, 20, {"attention_mask": mask, "position_ids": positions}),
        (0, 4, {"attention_mask": longer, "position_ids": positions[:, -1:] + torch.arange(1, 5)}),
    ]
    found, expected, handle, cache = both(ids, calls, family)
    assert_close(found[0][mask.bool()], expected[0][mask.bool()])
    assert_close(found[1], expected[1])
    windows = {"a window across padding"} if family == "gpt_oss" else set()
    assert {reason for _, reason in handle.fallbacks()} == {"padding after a token"} | windows
    assert cache.stats().tokens == int(longer.sum())


def test_padding_cannot_be_shown_later():
    """Nothing was kept of it: that is an error, with a mask of any form, and not another number."""
    ids, mask = padded("left", (8, 5))
    ids = ids[:, -8:]
    mask = mask[:, -8:]
    model = tiny("llama")
    only_attention(model)
    shown = torch.ones(2, 9, dtype=torch.long)
    for later in (shown, None, torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.zeros(2, 1, 1, 9)):
        cache = PagedCache(model, num_pages=40, page_size=8)
        run(model, ids, cache, attention_mask=mask)
        with pytest.raises(RuntimeError, match="PagedCache: attention_mask must keep hiding what was padding"):
            run(model, ids[:, :1], cache, attention_mask=later)


@pytest.mark.parametrize("patched", [False, True])
def test_out_of_pages(patched):
    """The call fails; what the cache had, and others' tokens, stay; after reset() there is room again."""
    model = tiny("llama")
    ids = tokens(2, 20)
    options = {**OPTIONS, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options).tolist()
    if patched:
        only_attention(model)
    cache = PagedCache(model, num_pages=12, page_size=8)
    other, _ = cache.pages.allocate()
    slots = cache.pages.append([other], [16])
    for data in (cache.pages.k, cache.pages.v):
        data.flatten(1, 2)[:, slots] = 7.0
    with pytest.raises(OutOfPages, match="kv_cache: 12 pages are needed and 10 of 12 can be had"):
        run(model, tokens(2, 48), cache)
    assert cache.stats().pages_used == 2 and cache.get_seq_length() == 0
    whole = run(model, ids, None)
    assert_close(run(model, ids[:, :10], cache), whole[:, :10])
    filled = cache.stats()
    with pytest.raises(OutOfPages, match="kv_cache: 8 pages are needed and 6 of 12 can be had"):
        run(model, tokens(2, 38), cache)
    assert cache.stats() == filled and cache.get_seq_length() == 10
    assert_close(run(model, ids[:, 10:], cache), whole[:, 10:])
    with pytest.raises(OutOfPages, match="kv_cache: [24] pages are needed"):
        model.generate(ids, past_key_values=cache, **{**options, "max_new_tokens": 40, "min_new_tokens": 40})
    cache.pages.check()
    cache.reset()
    assert cache.stats().pages_used == 2
    assert model.generate(ids, past_key_values=cache, **options).tolist() == expected
    for data in (cache.pages.k, cache.pages.v):
        assert (data.flatten(1, 2)[:, slots] == 7.0).all()


def test_a_row_that_is_too_long():
    model = tiny("llama")
    cache = PagedCache(model, num_pages=12, page_size=8, max_length=16)
    with pytest.raises(OutOfPages, match="PagedCache: a row must have at most 16 tokens, got 20"):
        run(model, tokens(1, 20), cache)
    run(model, tokens(2, 16), cache)
    assert cache.stats().pages_used == 4


@pytest.mark.parametrize("patched", [False, True])
def test_exception_in_a_layer(patched):
    """No page is lost; going on is refused, cutting the forward back or starting over is right again."""
    model = tiny("llama")
    ids, mask = padded("left", (20, 13, 6))
    options = {**OPTIONS, "attention_mask": mask}
    expected = model.generate(ids, **options).tolist()
    next_mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
    truth = run(model, torch.cat((ids, ids[:, :1]), 1), None, attention_mask=next_mask)[:, -1]
    if patched:
        only_attention(model)
    cache = PagedCache(model, num_pages=40, page_size=8)
    run(model, ids, cache, attention_mask=mask)

    def fail(*given):
        raise KeyError("in the middle")

    hook = model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        run(model, ids[:, :1], cache, attention_mask=next_mask)
    hook.remove()
    with pytest.raises(RuntimeError, match="PagedCache: layer 1 must hold as many tokens .* crop.*reset"):
        run(model, ids[:, :1], cache, attention_mask=torch.nn.functional.pad(next_mask, (0, 1), value=1))
    cache.crop(20)
    assert_close(run(model, ids[:, :1], cache, attention_mask=next_mask)[:, -1], truth)
    cache.pages.check()
    cache.reset()
    assert cache.stats().pages_used == 0
    assert model.generate(ids, past_key_values=cache, **options).tolist() == expected


@pytest.mark.parametrize("patched", [False, True])
def test_a_request_that_fails_is_taken_out_of_its_batch(patched):
    """The step is cut back, the row goes, and the others finish with the tokens that they have alone."""
    model = tiny("llama")
    ids, mask = padded("left", (20, 13, 6))
    alone = [model.generate(row[seen.bool()][None], **OPTIONS)[0, -6:] for row, seen in zip(ids, mask)]
    if patched:
        only_attention(model)
    cache = PagedCache(model, num_pages=40, page_size=8)

    def fail(module, given):
        if len(given[0]) == 3 and cache.get_seq_length(0) == 22:
            raise KeyError("the second request")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    names, answers, step = [0, 1, 2], {0: [], 1: [], 2: []}, ids
    while len(answers[0]) < 6:
        try:
            logits = run(model, step, cache, attention_mask=mask)
        except KeyError:
            cache.crop(-1)
            staying = torch.tensor([0, 2])
            cache.batch_select_indices(staying)
            names, step, mask = [0, 2], step[staying], mask[staying]
            continue
        step = logits[:, -1].argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        for name, token in zip(names, step):
            answers[name].append(token.item())
    hook.remove()
    assert [answers[name] for name in (0, 2)] == [alone[name].tolist() for name in (0, 2)]
    assert answers[1] == alone[1][:2].tolist()
    cache.pages.check()
    cache.reset()
    assert cache.stats().pages_used == 0


def test_crop_has_both_contracts():
    """Minus the number to forget; above 0 the number to keep, as up to transformers 5.14; 0 forgets nothing."""
    cache = PagedCache(tiny("llama"), num_pages=10, page_size=8)
    states = torch.randn(2, 2, 2, 20, 16)
    for layer in (0, 1):
        cache.update(*states, layer)
    for given, length, pages in ((0, 20, 6), (-3, 17, 6), (18, 17, 6), (9, 9, 4), (-1, 8, 2), (-99, 0, 0)):
        cache.crop(given)
        assert (cache.get_seq_length(), cache.stats().pages_used) == (length, pages)

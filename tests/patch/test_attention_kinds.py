"""Attention in models that are no plain decoders: encoders, translators, vision, images in text, latent heads."""

import functools

import pytest
import torch

import fusedops
from fusedops.patch import patch
from fusedops.testing.accuracy import Budget, errors
from tests.patch.tiny_models import fill, tokens

transformers = pytest.importorskip("transformers")

IDS, PIXELS = tokens(2, 20), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 14:] = 0
IMAGE = 120  # the token that stands for a part of an image

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96}
COMMON = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**COMMON, "image_size": 32, "patch_size": 8}
DECODER = {**COMMON, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "pad_token_id": 0}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
LATENT = {
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16},
    **{"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "num_key_value_heads": 4,
}


def bert():
    return transformers.AutoModel.from_config(transformers.BertConfig(**COMMON))


def siglip():
    return transformers.AutoModel.from_config(transformers.SiglipVisionConfig(**VISION))


def bart():
    sizes = {"vocab_size": 128, "d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, **LAYERS}
    return transformers.AutoModelForSeq2SeqLM.from_config(transformers.BartConfig(**sizes))


def deepseek():
    return transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**COMMON, **LATENT))


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**DECODER, layer_types=layers, query_pre_attn_scalar=16),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE + 1,
        eoi_token_index=IMAGE + 2,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def encode(model):
    """Hidden states with and without padding."""
    return model(IDS).last_hidden_state, model(IDS, attention_mask=MASK).last_hidden_state[MASK.bool()]


def see(model):
    return (model(PIXELS).last_hidden_state,)


def translate(model):
    """With cross-attention to padded input, at once and in beams with a cache."""
    call = functools.partial(model.generate, IDS, attention_mask=MASK, max_new_tokens=8, do_sample=False, num_beams=2)
    return model(IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :7]).logits, call()


def continue_text(model):
    generated = model.generate(IDS, attention_mask=MASK.flip(1), max_new_tokens=8, do_sample=False)
    return model(IDS).logits, model(IDS, attention_mask=MASK).logits[MASK.bool()], generated


def describe(model):
    """Tokens of an image see each other in both directions."""
    ids = IDS.where(IDS < IMAGE, 3)
    ids[:, 5:9] = IMAGE
    given = {"pixel_values": PIXELS, "token_type_ids": (ids == IMAGE).long(), "attention_mask": MASK}
    generated = model.generate(ids, **given, max_new_tokens=6, do_sample=False)
    return model(ids, **given).logits[MASK.bool()], generated


# how it is made, how it is called, number of attentions
KINDS = {
    "encoder": (bert, encode, 2),
    "vision": (siglip, see, 2),
    "encoder and decoder": (bart, translate, 6),
    "latent heads": (deepseek, continue_text, 2),
    "images in text": (gemma3, describe, 4),
}


@pytest.mark.parametrize("before", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds(kind, before):
    """Within the budget of eager attention, and after undo bitwise what it was, each config with its own name."""
    make, call, count = KINDS[kind]
    torch.manual_seed(0)
    model = fill(make().eval())
    model.set_attn_implementation(before)
    with torch.no_grad():
        expected = call(model)
        handle = patch(model, norm=False, mlp=False, rotary=False)
        assert handle.report.counts["attention"] == count
        fusedops.reset_counters()
        found = call(model)
        assert handle.fallbacks() == {} and fusedops.counters().keys() == {("attention", "torch")}
        handle.undo()
        restored = call(model)
    budget = Budget.for_dtype(torch.float32)
    for mine, stock, again in zip(found, expected, restored, strict=True):
        assert torch.equal(again, stock)
        if stock.is_floating_point():
            measured = errors(mine, stock.double())
            assert measured.rms <= budget.rms * count**0.5 and measured.peak <= budget.peak * count**0.5, measured
        else:
            assert torch.equal(mine, stock)


def test_parts_with_attentions_of_their_own():
    """A model whose parts had different functions gets each of them back."""
    model = fill(gemma3().eval())
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    configs = {id(m.config): m.config for m in model.modules() if "config" in vars(m)}.values()
    before = [config._attn_implementation for config in configs]
    assert {"eager", "sdpa"} <= set(before)
    handle = patch(model)
    assert [config._attn_implementation for config in configs].count("fusedops") >= 2
    handle.undo()
    assert [config._attn_implementation for config in configs] == before

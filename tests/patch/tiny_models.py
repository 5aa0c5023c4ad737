"""Tiny random models of every family that issue tests name, and one family that no list contains."""

import torch
from torch import nn
from torch.nn import functional as F

VOCAB = 128
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tied random ones repeat the last token for ever
}
_WINDOWED = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts_per_tok": 2}

# family -> (name of its configuration class, options beyond the shape)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": _WINDOWED}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": _WINDOWED}),
    "phi3": ("Phi3Config", {"sliding_window": 8, "resid_pdrop": 0.1}),
    "phi3_partial": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "gpt_oss": ("GptOssConfig", {"sliding_window": 8, "num_local_experts": 4, "layer_types": _WINDOWED, **_EXPERTS}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **_EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS}),
    "glm": ("GlmConfig", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
}
# families whose rotary parameters are not optional
_ROPE = {
    "gpt_oss": {"rope_type": "default", "rope_theta": 10000.0},
    "phi3_partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "glm": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def tiny(family, dtype=torch.float32, **options):
    """A model in evaluation mode whose every parameter has values that matter."""
    import transformers

    class_name, extra = FAMILIES[family]
    given = {**_SHAPE, **extra, **options}
    if family in _ROPE:
        given["rope_parameters"] = dict(_ROPE[family])
    config = getattr(transformers, class_name)(**given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    return fill(model.eval(), centre=0.0 if family.startswith("gemma") else 1.0)


def fill(model, centre=1.0):
    """Give every parameter seeded values; norm weights lie around `centre`."""
    seeded = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=seeded)
            is_norm = "norm" in name or "gain" in name
            parameter.copy_(values * 0.2 + centre if is_norm else values * (0.5 if parameter.dim() == 1 else 0.15))
    return model


def tokens(batch=2, length=12, seed=0):
    """Seeded token ids without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    """Logits without gradients."""
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


# A decoder with names, layouts and spellings of its own.


class Scaler(nn.Module):
    """An RMS norm that rounds once, its parameter and its epsilon under unusual names."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.tiny = 1e-5

    def forward(self, signal):
        wide = signal.float()
        return (wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + self.tiny) * self.gain.float()).to(
            signal.dtype
        )


class Mixer(nn.Module):
    """A gated MLP whose projections are called w1, w2, w3, with torch's own GELU."""

    def __init__(self, width, inner):
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, signal):
        return self.w2(self.w3(signal) * F.gelu(self.w1(signal)))


def rope_pair(queries, keys, cosines, sines):
    """Rotary embedding under another name, on the first half of each head."""
    width = cosines.shape[-1]

    def turn(x):
        part, rest = x[..., :width], x[..., width:]
        left, right = part.chunk(2, dim=-1)
        return torch.cat((part * cosines[:, None] + torch.cat((-right, left), -1) * sines[:, None], rest), -1)

    return turn(queries), turn(keys)


class Looker(nn.Module):
    """Attention with one projection for q, k and v."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.all_in = nn.Linear(width, 3 * width, bias=False)
        self.all_out = nn.Linear(width, width, bias=False)

    def forward(self, signal, angles):
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.all_in(signal).chunk(3, dim=-1))
        q, k = rope_pair(q, k, *angles)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.all_out(mixed.transpose(1, 2).flatten(2))


class Floor(nn.Module):
    """A pre-norm layer written in two lines."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.before_looking = Scaler(width)
        self.looking = Looker(width, heads)
        self.before_mixing = Scaler(width)
        self.mixing = Mixer(width, inner)

    def forward(self, stream, angles):
        stream = stream + self.looking(self.before_looking(stream), angles)
        return stream + self.mixing(self.before_mixing(stream))


class Tower(nn.Module):
    """A whole decoder that knows nothing of transformers."""

    def __init__(self, width=64, heads=4, inner=96, floors=3):
        super().__init__()
        self.words = nn.Embedding(VOCAB, width)
        self.floors = nn.ModuleList([Floor(width, heads, inner) for _ in range(floors)])
        self.roof = Scaler(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.rotated = width // heads // 2

    def forward(self, ids):
        signal = self.words(ids)
        places = torch.arange(ids.shape[1])[None, :, None] / 10 ** torch.linspace(0, 2, self.rotated // 2)
        places = torch.cat((places, places), -1)
        angles = places.cos().to(signal.dtype), places.sin().to(signal.dtype)
        for floor in self.floors:
            signal = floor(signal, angles)
        return self.head(self.roof(signal))


def tower(dtype=torch.float32):
    """The family that nobody listed."""
    torch.manual_seed(0)
    return fill(Tower().eval()).to(dtype)

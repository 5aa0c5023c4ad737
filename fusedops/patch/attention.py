"""Attention: which modules ask transformers for their attention function, and the function of ours that they get.

transformers keeps attention functions and mask functions in two registries, and a config names the one in use. Ours are
registered for as long as some patched model needs them, and the configs of that model name them. A module's own
function, or torch's, still answers calls that the operator does not take.
"""

import contextlib
import functools
import weakref

import torch
from torch.nn import Parameter

from fusedops._core import env
from fusedops._core.register import operators
from fusedops.ops.attention import attention, reference
from fusedops.ops.attention._options import MAX_D, STEP_D, WHOLE_D
from fusedops.patch import continuous_attention, masks, paged_states
from fusedops.patch.calls import read_forward
from fusedops.patch.instance import ATTENTION_ATTRIBUTE, UNSUPPORTED, State, record_fallback
from fusedops.patch.probing import agreement, attempt, detached_copy, generator

NAME = "fusedops"  # transformers treats names with sdpa, flash or / in them in its own way
IMPLEMENTATION = "_attn_implementation_internal"  # its setter would also change the configs inside
OWN_NAMES = ("eager", "sdpa", "flex_attention", "paged|eager", "flash_attention", "kernels-community")
OPERATOR_OPTIONS = ("scaling", "dropout", "sliding_window", "softcap", "s_aux", "is_causal")
# further keywords that eager attention ignores: they are for packed batches of flash attention, or for capturing
IGNORED_OPTIONS = (
    *("output_attentions", "position_ids", "deterministic"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)

_attention = operators()["attention"]
_live = weakref.WeakSet()  # of Switch: what keeps our functions registered
_is_compiling = torch.compiler.is_dynamo_compiling
_is_autocast_enabled = torch.is_autocast_enabled


class Switch:
    """One config of a patched model, naming our functions as long as the switch is on.

    Attributes:
        config: The config that modules and mask creation read the name from.
        previous: The name before.
    """

    def __init__(self, config, previous):
        self.config = config
        self.previous = previous

    def on(self):
        """Register our functions and name them in the config; once is enough."""
        if self in _live:
            return
        env.validate()  # a compiled forward would see it change from unread to read
        _live.add(self)
        for registry, function in _registries():
            registry._global_mapping[NAME] = function
        setattr(self.config, IMPLEMENTATION, NAME)
        weakref.finalize(self, _unregister_unused).atexit = False

    def off(self):
        """Name the previous functions again, and take ours out of the registries if no other model needs them."""
        _live.discard(self)
        shared = any(other.config is self.config for other in _live)
        if getattr(self.config, IMPLEMENTATION) == NAME and not shared:
            setattr(self.config, IMPLEMENTATION, self.previous)
        _unregister_unused()

    def __reduce__(self):
        """A copy, or what comes out of a pickle, is switched on like the model it belongs to."""
        return _switched_on, (self.config, self.previous)


def _switched_on(config, previous):
    switch = Switch(config, previous)
    switch.on()
    return switch


def _registries():
    """(registry, our function) of transformers; they have no way to unregister but their mapping."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return (AttentionInterface, attention_forward), (AttentionMaskInterface, masks.make_mask)


def _unregister_unused():
    if not any(True for _ in _live):  # its length still counts what is being freed
        for registry, _ in _registries():
            registry._global_mapping.pop(NAME, None)


def previous_name(config):
    """The name of the attention function that a config had before it was patched."""
    name = getattr(config, IMPLEMENTATION, None)
    if name != NAME:
        return name
    return next((switch.previous for switch in _live if switch.config is config), "sdpa")


class AttentionState(State):
    """State of an attention whose function is ours.

    Attributes:
        eager: The function of the model's own file.
        switch: Shared by the modules that read one config.
    """

    __slots__ = ("eager", "switch")
    attribute = ATTENTION_ATTRIBUTE

    def __init__(self, eager):
        super().__init__(attention_forward)
        self.eager = eager
        self.switch = None

    def install(self, module):
        """Mark the module, and have its config name our function."""
        module.__dict__[self.attribute] = self
        self.switch.on()

    def obstacle(self, module):
        """Never one: a function that was chosen since is kept."""
        return None

    def restore(self, module):
        """Take the mark away; `switch_off` is for whoever knows which other modules read the config."""
        del module.__dict__[self.attribute]


def switch_off(states, remaining=()):
    """Switch off the configs of attention states that are gone, unless a remaining one reads them."""
    kept = {id(state.switch) for state in remaining if isinstance(state, AttentionState)}
    for switch in {id(state.switch): state.switch for state in states if isinstance(state, AttentionState)}.values():
        if id(switch) not in kept:
            switch.off()


def attention_forward(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, is_causal=None, **kwargs,
):  # fmt: skip
    """Attention function for transformers' ``AttentionInterface``.

    Args:
        module: The attention.
        query, key, value: ``[B, H, S, D]``, of key and value maybe fewer heads.
        attention_mask: None, what `masks.make_mask` made, or a dense mask; it holds the sliding window.
        s_aux: Sinks.

    Returns:
        ``([B, S, H, D], None)``; with the weights where they are asked for.
    """
    state = getattr(module, ATTENTION_ATTRIBUTE, None)
    options = (scaling, dropout, sliding_window, softcap, s_aux, is_causal)
    if continuous_attention.takes(kwargs.get("cache")):
        paged = paged_forward if _not_compiled is None or not _is_compiling() else _not_compiled
        return paged(module, state, query, key, value, options, kwargs)
    reason = None
    if state is None:
        reason = ""
    elif dropout:
        reason = "dropout in training"
    elif kwargs.get("output_attentions"):
        reason = "the weights are asked for"
    elif kwargs.get("position_bias") is not None or kwargs.get("cache") is not None:
        reason = "a position bias, or a paged cache of another release"
    elif attention_mask is not None and attention_mask.dim() != 4:
        reason = "a mask without four dimensions"
    if reason is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if type(key) is paged_states.PagedStates:
            try:
                return paged_states.attend(query, key, value, attention_mask, scaling, softcap, s_aux, causal), None
            except UNSUPPORTED as error:  # below, keys and values are gathered by the first operator that gets them
                record_fallback(state.fallbacks, type(module).__name__, error, (query,))
        try:
            return _compute(query, key, value, attention_mask, scaling, softcap, s_aux, causal), None
        except UNSUPPORTED as error:
            reason = error
    if state is not None and not _is_compiling():
        record_fallback(state.fallbacks, type(module).__name__, reason, (query,))
    return run_stock(module, state, query, key, value, attention_mask, {**_given(options), **kwargs})


def _given(options):
    """{name: value} of the options of an attention function that are not None."""
    return {name: value for name, value in zip(OPERATOR_OPTIONS, options, strict=True) if value is not None}


def paged_forward(module, state, query, key, value, options, kwargs):
    """`attention_forward` on the paged cache of transformers' continuous batching, which says itself who sees what."""
    scaling, dropout, _, softcap, sinks, _ = options
    call = continuous_attention.Call(module, key, value, kwargs)
    reason = "dropout in training" if dropout else None
    if state is not None and reason is None:
        try:
            return call.attend(query, scaling, softcap, sinks), None
        except UNSUPPORTED as error:
            reason = error
    if state is not None:
        record_fallback(state.fallbacks, type(module).__name__, reason, (query,))
    key, value, mask = call.dense()
    rest = {name: value for name, value in kwargs.items() if name != "cache"}
    return run_stock(module, state, query, key, value, mask, {**_given(options), **rest})


_not_compiled = None  # `paged_forward` where the compiler must not look into it


def enable_paged():
    """Keep the compiler out of paged attention, as transformers keeps it out of its cache.

    Not before an engine is made: the decorator imports the compiler.
    """
    global _not_compiled
    _not_compiled = torch.compiler.disable(paged_forward)


def _compute(query, key, value, mask, scaling, softcap, sinks, causal):
    """``[B, S, H, D]`` of attention under any mask of four dimensions."""
    left = -1
    if mask is not None:
        if mask.dtype is masks.SHORT:
            causal = True
            key, value, mask, left = masks.unfold(mask, key, value)
        else:
            causal = False
            if mask.shape[3] > key.shape[2]:
                mask = mask[..., : key.shape[2]]
    run = None
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        query, key, value = _autocast(query, key, value)
    elif not _is_compiling():
        run = _attention.direct(query)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if run is not None:
        return run(q, k, v, sinks, None, mask, None, None, None, scaling, causal, left, -1, softcap or 0.0)[0]
    return attention(
        q, k, v, softmax_scale=scaling, causal=causal, window_size=(left, -1), softcap=softcap or 0.0, sinks=sinks,
        mask=mask,
    )  # fmt: skip


def _autocast(*tensors):
    """The tensors in the dtype that autocast prescribes for products, if it is on."""
    device = tensors[0].device.type
    if not _is_autocast_enabled(device):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def run_stock(module, state, query, key, value, mask, options):
    """(out, weights or None) of the function that ran before patching, or of one that means the same.

    That is the model's eager function or torch's; the others take no dense mask. Only eager knows softcap and sinks.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    previous = previous_name(module.config) if state is None else state.switch.previous
    eager_function = read_forward(type(module)).eager if state is None else state.eager
    is_causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    eager = previous == "eager" or any(options.get(name) for name in ("softcap", "output_attentions"))
    eager = eager or "s_aux" in options
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None or (causal and (eager or queries not in (1, keys))):
        mask = masks.densely(mask, query, key, causal)
    if not eager or eager_function is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=mask.device).where(mask, torch.finfo(query.dtype).min)
    return eager_function(module, query, key, value, mask, **{"scaling": None, **options})


@contextlib.contextmanager
def watched(see):
    """Inside, ``see(module, out, expected)`` for each attention of ours; `expected` is the stock function's in float32.

    Rows that may see no key are 0 in both: transformers gives them the mean of all values.
    """

    def both(module, query, key, value, attention_mask, **options):
        answer = attention_forward(module, query, key, value, attention_mask, **options)
        if ATTENTION_ATTRIBUTE in vars(module):
            out = answer[0]
            wide = [tensor.float() for tensor in (query, key, value)]
            expected = run_stock(module, vars(module)[ATTENTION_ATTRIBUTE], *wide, attention_mask, options)[0]
            dense = None if attention_mask is None else masks.densely(attention_mask, query, key, True)
            if dense is not None and dense.dtype == torch.bool:
                seen = dense.any(-1).transpose(1, 2)[..., None]
                out, expected = out.where(seen, 0), expected.where(seen, 0)
            see(module, out, expected)
        return answer

    registry, function = _registries()[0]
    registry._global_mapping[NAME] = both
    try:
        yield
    finally:
        registry._global_mapping[NAME] = function


def find_attention(module):
    """(State, text) of an attention that asks transformers for its function, a reason why it is left alone, or None."""
    reading = read_forward(type(module))
    if reading is None or "config" not in vars(module):
        return None
    reason = _unfit(module, reading) or _differs(module, reading)
    if reason is not None:
        return reason
    names = [text for name, text in (("softcap", "softcap"), ("s_aux", "sinks")) if name in reading.options]
    return AttentionState(reading.eager), f"attention({', '.join(names)})"


def _unfit(module, reading):
    """Why this attention cannot be replaced, from what its class and config say; None where nothing is in the way."""
    config = module.config
    if not hasattr(config, IMPLEMENTATION):
        return "its config names no attention function"
    name = previous_name(config)
    if name is not None and not name.removeprefix("paged|").startswith(OWN_NAMES):
        return f"its attention was already replaced by {name}"
    if getattr(config, "output_attentions", False):
        return "the model returns attention weights"
    if reading.interface._local_mapping or reading.eager is None or not reading.options:
        return "its file has attention functions of its own"
    if reading.computes_with_mask:
        return "its forward computes with the mask"
    if "s_aux" in reading.options:
        name = reading.options["s_aux"]
        if name is None or name not in module._parameters and getattr(module, name, None) is not None:
            return "its sinks are no parameter"
    unknown = sorted(set(reading.options) - {*OPERATOR_OPTIONS, *IGNORED_OPTIONS})
    return f"its attention depends on {', '.join(unknown)}" if unknown else None


def _differs(module, reading):
    """Why the module's eager function is not the attention that we compute, from its values on a probe, or None."""
    groups = max(getattr(module, "num_key_value_groups", 1), 1)
    width = getattr(module, "head_dim", None)
    width = width if isinstance(width, int) else 16
    if width % STEP_D or (width > WHOLE_D and width != MAX_D):
        return f"heads of {width} elements"
    seeded = generator()
    copy = detached_copy(module)
    copy.__dict__["training"] = False
    sinks, heads, options = None, 2 * groups, {}
    if "softcap" in reading.options:
        options["softcap"] = 3.0
    if reading.options.get("s_aux") in copy._parameters:
        name = reading.options["s_aux"]
        heads = copy._parameters[name].numel()
        sinks = torch.randn(heads, generator=seeded)
        options["s_aux"] = copy._parameters[name] = Parameter(sinks, requires_grad=False)
    query, key, value = (
        torch.randn(1, number, length, width, generator=seeded)
        for number, length in ((heads, 3), (heads // groups, 5), (heads // groups, 5))
    )
    hidden = torch.ones(3, 5, dtype=torch.bool).triu(3)[None, None]
    additive = torch.zeros(()).masked_fill(hidden, torch.finfo(torch.float32).min)
    call = functools.partial(reading.eager, scaling=0.3, dropout=0.0, **options)
    out = attempt(call, copy, query, key, value, additive)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    expected = reference.attention(q, k, v, sinks, *[None] * 5, 0.3, True, -1, -1, options.get("softcap", 0.0))[0]
    if not isinstance(out, tuple) or agreement(out[0], expected) is None:
        return "computes another attention than softmax(q @ k.T) @ v"
    return None

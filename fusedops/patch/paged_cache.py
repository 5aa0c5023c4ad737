"""A cache for ``model.generate(..., past_key_values=...)`` whose keys and values lie in pages of one pool."""

import functools
import weakref

import torch

from fusedops.kv_cache import PagedKVCache
from fusedops.ops.rotary import MAX_D
from fusedops.patch import paged_states
from fusedops.patch.attention import IMPLEMENTATION, NAME
from fusedops.patch.paged_rows import Rows
from fusedops.patch.paged_states import NewStates, PagedStates

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


class PagedLayer:
    """One layer of a `PagedCache`, as transformers' caches have them.

    Pages are those of all layers, so whatever moves rows or forgets tokens is asked of the cache.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False  # the mask holds the window, the pages hold all keys
    supports_early_init = True

    def __init__(self, rows, index, reads_pages):
        super().__init__()
        self.rows = rows
        self.index = index
        self.reads_pages = reads_pages
        self.is_initialized = True

    def lazy_initialization(self, *states):
        """Nothing: the pool is made with the cache."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Take the keys and values of new tokens; (keys, values) of all tokens.

        Args:
            key_states, value_states: ``[B, Hk, count, D]``.
        """
        self._check(key_states, value_states)
        batch, _, count, _ = key_states.shape
        step = self.rows.begin(self.index, batch, count)
        new = NewStates(self.rows, self.index, step, key_states, value_states)
        return (PagedStates(new, 0), PagedStates(new, 1)) if self.reads_pages() else tuple(new.gather())

    def _check(self, *states):
        for name, tensor, cache in zip(("key_states", "value_states"), states, (self.rows.pages.k, self.rows.pages.v)):
            heads, dim = cache.shape[3:]
            if tensor.dim() != 4 or (tensor.shape[1], tensor.shape[3]) != (heads, dim):
                expected = f"[B, {heads}, S, {dim}]"
                raise ValueError(f"PagedCache: {name} must have shape {expected}, got {list(tensor.shape)}")
            if tensor.dtype != cache.dtype:
                raise TypeError(f"PagedCache: {name} must be {cache.dtype} as the cache is, got {tensor.dtype}")
            if tensor.device != cache.device:
                raise ValueError(f"PagedCache: {name} must be on {cache.device} as the cache is, got {tensor.device}")
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise RuntimeError(f"PagedCache: {name} must not require a gradient; run the model in torch.no_grad()")

    def get_seq_length(self):
        """Columns of this layer, padding among them."""
        return self.rows.filled[self.index]

    def get_mask_sizes(self, query_length):
        """(number of keys with the coming queries', position of the first); up to transformers 5.1 a tensor comes."""
        count = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.get_seq_length() + count, 0

    def get_max_length(self):
        """No bound: pages are for tokens, and this would be of columns."""
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.11

    def _ask_the_cache(self, *args):
        raise NotImplementedError("PagedCache: all layers share pages; call the method of the cache")

    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = _ask_the_cache
    offload = prefetch = _ask_the_cache


class PagedCache:
    """Keys and values of a batch in pages, for any decoder of transformers that keeps one key and value a token.

    Where the model is patched, its attention writes new tokens to their pages and reads them there; padding of the
    batch takes no page, and nothing is gathered. Masks that pages cannot express (dense ones, a sliding window across
    padding) are answered from gathered keys and values, and counted in ``patched.fallbacks()``. Any other attention is
    given gathered keys and values in each call, and padding is stored.

    It is a ``transformers.Cache``: beams, several answers to a prompt, assisted decoding, prompt lookup and prefill in
    chunks work on the table of pages, with copy on write.

    Args:
        model_or_config: A model of transformers, or its config: the very object, as it names the attention.
        num_pages: Pages of the pool; it never grows.
        page_size: Tokens of a page: 1, or a multiple of 8 up to 256.
        max_length: Tokens that one row may have; None is as many as the pool holds.
        dtype, device: Of keys and values; None is the model's.

    Attributes:
        pages: The `fusedops.PagedKVCache`.

    Raises:
        TypeError: model_or_config is neither, or dtype is not float16, bfloat16 or float32.
        ValueError: a size is not one of the above.
        NotImplementedError: an encoder and decoder, layers without keys (linear attention, convolution), layers of
            different heads, latent attention (MLA), or heads of more than MAX_D elements.
    """

    def __new__(cls, *args, **kwargs):
        """An instance of this class and of transformers' own, which is imported now."""
        return super().__new__(_cache_class(cls))

    def __init__(self, model_or_config, *, num_pages, page_size=16, max_length=None, dtype=None, device=None):
        config = _decoder_config(model_or_config)
        num_layers, heads, dim = _shape(config)
        source = model_or_config if isinstance(model_or_config, torch.nn.Module) else config
        dtype = dtype or getattr(source, "dtype", None) or torch.get_default_dtype()
        if dtype not in DTYPES:
            raise TypeError(f"PagedCache: dtype must be float16, bfloat16 or float32, got {dtype}")
        device = getattr(source, "device", None) if device is None else device
        self.pages = PagedKVCache(
            num_layers, num_pages, page_size, heads, dim, max_length=max_length, dtype=dtype, device=device
        )
        self._rows = Rows(self.pages, num_layers)
        reads_pages = functools.partial(_names_ours, weakref.ref(config))  # a copy of the cache is for the same model
        layer_class = _layer_class()
        super().__init__(layers=[layer_class(self._rows, index, reads_pages) for index in range(num_layers)])

    def stats(self):
        """What the pool holds now, as `fusedops.kv_cache.CacheStats`."""
        return self.pages.stats()

    def reset(self):
        """Forget everything: all pages come back, and another batch may follow. Right after any error, too."""
        self._rows.clear()

    def crop(self, tokens_to_remove):
        """Forget the last columns.

        Args:
            tokens_to_remove: Minus their number. Above 0: how many to keep, as up to transformers 5.14.
        """
        length = max(self._rows.filled)
        keep = min(length, tokens_to_remove) if tokens_to_remove > 0 else length + tokens_to_remove
        self._rows.crop(max(keep, 0))

    def reorder_cache(self, beam_idx):
        """Make row i what row ``beam_idx[i]`` is."""
        self._rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices):
        """Keep these rows: numbers, or one bool for each row."""
        self._rows.select(torch.arange(len(self._rows.sequences))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats):
        """Have every row several times, one after another."""
        self._rows.select([row for row in range(len(self._rows.sequences)) for _ in range(repeats)])


@functools.cache
def _cache_class(cls):
    from transformers.cache_utils import Cache

    return cls if issubclass(cls, Cache) else type(cls.__name__, (cls, Cache), {"__module__": cls.__module__})


@functools.cache
def _layer_class():
    from transformers.cache_utils import CacheLayerMixin

    paged_states.keep_compiler_out()
    update = torch.compiler.disable(PagedLayer.update)
    return type("PagedLayer", (PagedLayer, CacheLayerMixin), {"__module__": __name__, "update": update})


def _names_ours(config):
    """Whether the config that attentions read names our function, which takes `PagedStates`."""
    return getattr(config(), IMPLEMENTATION, None) == NAME


def _decoder_config(model_or_config):
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            "PagedCache: model_or_config must be a model of transformers or its config, "
            f"got {type(model_or_config).__name__}"
        )
    if config.is_encoder_decoder:
        raise NotImplementedError(f"PagedCache: model must be a decoder alone, got {config.model_type}")
    return config.get_text_config(decoder=True)


def _shape(config):
    """(layers, heads of keys, elements of a head) of a decoder, from its config."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if kinds:
        raise NotImplementedError(f"PagedCache: layers must be of {', '.join(LAYER_TYPES)}, got {', '.join(kinds)}")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise NotImplementedError("PagedCache: keys and values must be stored as heads, got latent attention (MLA)")
    shapes = {_heads(layer) for layer in getattr(config, "per_layer_config", None) or [config]}
    if len(shapes) != 1 or None in next(iter(shapes)):
        raise NotImplementedError(f"PagedCache: all layers must have the same heads, got {sorted(shapes, key=str)}")
    heads, dim = shapes.pop()
    if dim > MAX_D:
        raise NotImplementedError(f"PagedCache: heads must have at most MAX_D = {MAX_D} elements, got {dim}")
    return config.num_hidden_layers, heads, dim


def _heads(config):
    """(heads of keys, elements of a head), None where a config does not say."""
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None)
    if dim is None and heads:
        dim = config.hidden_size // heads
    return kv_heads, dim

"""The masks of a model with our attention: what transformers asks for when it prepares a forward, in a short form.

A decoder's mask is causal, often with a sliding window, over keys of which some are padding. That much fits in a tensor
of uint8 ``[B, 1, L + W, L]``: one row of keys, 1 where a key is no padding, broadcast over the third dimension. The
last query is that of the last of the L keys (a static cache may have more, unused ones), and a query sees W keys at
most. Without padding it is the empty tensor ``[1, 0, L + W, L]``, and where nothing of this is needed None: causal, the
last query at the last key.

transformers hands a tensor of four dimensions through untouched, and its shape survives a copy or a move. Nobody else's
mask is of uint8, and where a model computes with its mask, no mask of L + W rows fits anything: that raises. Everything
else (packed sequences, masks given as functions, a cache whose length only the device knows) gets the dense boolean
mask that torch's attention would get.
"""

import sys

import torch

SHORT = torch.uint8
NO_WINDOW = sys.maxsize

_is_compiling = torch.compiler.is_compiling


def make_mask(**given):
    """Mask function for transformers' ``AttentionMaskInterface``, where the arguments are described.

    The positions of the queries are ``q_length`` and ``q_offset``; in transformers 5.0, a tensor ``cache_position``.
    """
    window = _causal_window(given)
    length = None if window is None else _valid_keys(given)
    if length is None:
        return _dense(given)
    padding = _padding(given.get("attention_mask"), given.get("kv_offset", 0), length)
    rows = length + min(window, length)
    if padding is not None:
        if isinstance(given.get("q_offset"), torch.Tensor):
            return _dense(given)  # for a static cache, transformers makes masks contiguous
        return padding.view(SHORT)[:, None, None].expand(-1, 1, rows, -1)
    if rows == 2 * length and length == given["kv_length"]:
        return None
    position = given.get("cache_position")
    device = given.get("device", "cpu") if position is None else position.device
    return torch.empty((1, 0, rows, length), dtype=SHORT, device=device)


def _causal_window(given):
    """How many keys a query sees at most, where the mask is causal with nothing else but a window; else None."""
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

    if given.get("use_vmap") or not given.get("allow_is_causal_skip", True):
        return None  # something is laid over it, or the mask's shape must stay the same from step to step
    function = given.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return NO_WINDOW
    if _is_compiling():
        return _window_of_config(given)
    parts = _captured(function) if _made_by(function, and_masks) else None
    if parts is None or len(parts) != 2 or causal_mask_function not in parts:
        return None
    overlay = parts[1] if parts[0] is causal_mask_function else parts[0]
    return _captured(overlay) if _made_by(overlay, sliding_window_overlay) else None


def _made_by(function, maker):
    """Whether a function was defined inside another one, of transformers."""
    name = getattr(function, "__qualname__", "")
    return name.startswith(f"{maker.__qualname__}.<locals>.") and function.__module__ == maker.__module__


def _captured(function):
    """The one value that a function took from where it was defined, or None."""
    cells = function.__closure__ or ()
    return cells[0].cell_contents if len(cells) == 1 else None


def _window_of_config(given):
    """The window, for the compiler, which does not show what a function is and what it captured.

    transformers names the window of a mask that nothing is laid over, or the size of the chunks in such a mask.
    """
    config, size = given.get("config"), given.get("local_size")
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return size if size == getattr(config, "sliding_window", None) and not chunked else None


def _valid_keys(given):
    """Number of keys up to the last query's, or None where only the device knows it, or it does not fit."""
    if given.get("cache_position") is None:
        queries, first = given["q_length"], given.get("q_offset", 0)
    else:
        queries, first = given["cache_position"].shape[0], given["cache_position"][0]
    if isinstance(first, torch.Tensor):
        if _is_compiling():
            return None
        first = int(first)
    length = first + queries - given.get("kv_offset", 0)
    return length if queries <= length <= given["kv_length"] else None


def _padding(mask, offset, length):
    """The part of a 2-D mask that stands for these keys; None where all of them are real."""
    if mask is None:
        return None
    mask = mask[:, offset : offset + length].bool()
    if mask.shape[1] < length:
        mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
    if not _is_compiling() and bool(mask.all()):
        return None
    return mask


def _dense(given):
    """transformers' own boolean mask; None where a mask that is not causal hides nothing."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**{**given, "allow_is_causal_skip": False})


def unfold(mask, key, value):
    """(key, value, keys that are no padding, left bound of the window) that a short mask stands for.

    Args:
        mask: As `make_mask` gives it, of uint8.
        key, value: ``[B, Hk, S, D]``; what lies behind the valid keys is cut off.
    """
    rows, length = mask.shape[2:]
    if length != key.shape[2]:
        key, value = key[:, :, :length], value[:, :, :length]
    padding = mask[:, :, :1].view(torch.bool) if mask.shape[1] else None
    return key, value, padding, rows - length - 1 if rows < 2 * length else -1


def densely(mask, query, key, causal):
    """The dense mask of a short one or of None; a dense mask as it is.

    Args:
        mask: What an attention function of ours was given.
        query, key: ``[B, H, S, D]``.
        causal: What None means.
    """
    if mask is not None and mask.dtype != SHORT:
        return mask
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and not causal:
        return torch.ones((1, 1, queries, keys), dtype=torch.bool, device=query.device)
    rows, length = (2 * keys, keys) if mask is None else mask.shape[2:]
    positions = torch.arange(length - queries, length, device=query.device)[:, None]
    columns = torch.arange(keys, device=query.device)
    seen = (columns <= positions) & (columns > positions - (rows - length))
    if mask is None or not mask.shape[1]:
        return seen[None, None]
    return seen & torch.nn.functional.pad(mask[:, :, :1].view(torch.bool), (0, keys - length))

"""Which calls of operators a model makes: its own forward on tensors without memory, at shapes of every class."""

import contextlib

import torch

from fusedops._core.register import Operator
from fusedops.patch import PagedCache, masks

EACH_BATCH = 8  # up to here every number of rows


def lengths(most):
    """Numbers of tokens up to `most`: around every power of two and the middle between two, odd ones and multiples.

    Kernels are compiled anew for 1, for multiples of 16, and where the defaults' arithmetic steps over a threshold.
    """
    found = {1, 2, most, most - 1}
    step = 4
    while step <= most:
        found |= {step - 1, step, step + 1, step + step // 2 - 1, step + step // 2}
        step *= 2
    return sorted(length for length in found if 1 <= length <= most)


def batches(most):
    """Numbers of rows up to `most`: each of the first ones, then as `lengths`."""
    return sorted({*range(1, min(most, EACH_BATCH) + 1), *lengths(most)})


def of_model(model, max_batch, max_seqlen, page_size=16, gradients=False):
    """(operator, arguments) of the prompts and steps of a patched model on meta, none twice alike."""
    found = {}
    with torch.no_grad(), _recorded(found):
        for batch in batches(max_batch):
            for length in lengths(max_seqlen):
                _generate(model, batch, length)
                _padded(model, batch, length)
            for room in (max_seqlen, max_seqlen - page_size):  # tables of a multiple of 16 pages or not
                for length in lengths(room - 1):
                    _paged(model, batch, length, room, page_size)
                    for total in _totals(batch, length):
                        _padded_paged(model, batch, length, total, room, page_size)
            for length in lengths(max_seqlen) if gradients else ():
                _differentiated(model, batch, length)
    return list(found.values())


def _tokens(batch, length):
    return torch.empty(batch, length, dtype=torch.long, device="meta")


def _generate(model, batch, length):
    """A prompt, and the step after it."""
    out = model(_tokens(batch, length), use_cache=True, logits_to_keep=1)
    model(_tokens(batch, 1), past_key_values=out.past_key_values, use_cache=True)


def _padded(model, batch, length):
    """The same for rows of different lengths."""
    out = model(
        _tokens(batch, length), attention_mask=_padding(batch, length), use_cache=True, logits_to_keep=1
    )  # fmt: skip
    mask = _padding(batch, length + 1)
    model(_tokens(batch, 1), attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)


def _padding(batch, length):
    """The short mask that stands for padding of a causal batch."""
    return torch.empty(batch, 1, 1, length, dtype=masks.SHORT, device="meta").expand(-1, -1, 2 * length, -1)


def _paged(model, batch, length, max_length, page_size):
    """The same on pages."""
    cache = _cache(model, batch, max_length, page_size)
    model(_tokens(batch, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
    model(_tokens(batch, 1), past_key_values=cache, use_cache=True)


def _cache(model, batch, max_length, page_size):
    pages = -(-max_length // page_size) * batch
    return PagedCache(model, num_pages=pages, page_size=page_size, max_length=max_length)


def _totals(batch, length):
    """Numbers of tokens of a padded batch of which a row has `length`: one of each class that there is."""
    possible = range(length + batch - 1, batch * length)
    multiple = next((total for total in possible if total % 16 == 0), None)
    other = next((total for total in possible if total % 16), None)
    return [total for total in (multiple, other) if total is not None]


def _padded_paged(model, batch, length, total, max_length, page_size):
    """Rows of different lengths on pages, padded on the left; of their masks a CPU tells what takes a page."""
    lengths = [length] + [1] * (batch - 1)
    left = total - sum(lengths)
    for row in range(1, batch):
        lengths[row] += min(left, length - 1)
        left -= lengths[row] - 1
    real = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    cache = _cache(model, batch, max_length, page_size)
    for columns in (length, 1):
        mask = real.to(masks.SHORT)[:, None, None].expand(-1, 1, 2 * real.shape[1], -1)
        model(_tokens(batch, columns), attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        real = torch.nn.functional.pad(real, (0, 1), value=True)


def _differentiated(model, batch, length):
    """A step of training, every weight with a gradient. The mask hides nothing, and says that nothing is packed."""
    mask = torch.empty((1, 0, 2 * length, length), dtype=masks.SHORT, device="meta")
    with torch.enable_grad():
        logits = model(_tokens(batch, length), attention_mask=mask, use_cache=False).logits
        if logits.requires_grad:
            logits.backward(torch.empty_like(logits))
    model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _recorded(found):
    """Note each operator's call, by what a launcher can see of it. Not a dispatch mode: modules notice one."""
    original = Operator.__call__

    def noting(self, *args, out=None):
        found.setdefault((self.name, *map(_seen, args)), (self, args))
        return original(self, *args, out=out)

    Operator.__call__ = noting
    try:
        yield
    finally:
        Operator.__call__ = original


def _seen(arg):
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.shape, arg.stride(), arg.storage_offset()
    return type(arg), arg

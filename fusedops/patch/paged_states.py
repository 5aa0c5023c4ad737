"""Keys and values as a paged cache hands them to attention: on their pages until somebody needs them side by side.

Our attention function takes them by their type, writes the new tokens and reads the pages. To any other code they are
tensors of the shape that other caches return: the first operator that gets one is given gathered keys or values. So
whoever changes keys after the cache, or attends by other means, computes the same, only slower.
"""

import torch
from torch.utils._pytree import tree_map_only

from fusedops.ops.paged_attention import paged_attention
from fusedops.ops.write_kv_cache import write_kv_cache


class NewStates:
    """What one layer adds in one forward, and the way to all that it has.

    Attributes:
        rows: The cache's `Rows`.
        layer: Index of the layer.
        step: Of the rows.
        key, value: ``[B, Hk, count, D]``; None once they are written.
    """

    def __init__(self, rows, layer, step, key, value):
        self.rows = rows
        self.layer = layer
        self.step = step
        self.key = key
        self.value = value
        self._gathered = None
        rows.pending = self

    def write(self):
        """Write the new tokens to their pages, once; without a layout by now, padding counts as tokens."""
        self._check_current()
        if self.key is None:
            return
        self.rows.lay_out(self.step)
        pages = self.rows.pages
        key, value = (states.transpose(1, 2).flatten(0, 1) for states in (self.key, self.value))
        write_kv_cache(key, value, pages.k[self.layer], pages.v[self.layer], self.step.slots)
        self.key = self.value = self.rows.pending = None

    def gather(self):
        """(keys, values), ``[B, Hk, stop, D]``: 0 where there is padding without a page."""
        if self._gathered is None:
            self.write()
            places, real = self.rows.places(self.step), self.rows.real
            self._gathered = []
            for cache in (self.rows.pages.k[self.layer], self.rows.pages.v[self.layer]):
                states = cache.flatten(0, 1)[places]
                if real is not None:
                    states.masked_fill_(~real[:, :, None, None].to(states.device), 0)
                self._gathered.append(states.transpose(1, 2))
        return self._gathered

    def _check_current(self):
        if self.step is not self.rows.step:
            raise RuntimeError("PagedCache: keys and values must be read before the cache changes, got those of before")


class PagedStates(torch.Tensor):
    """Keys (``part`` 0) or values (1) of one layer, ``[B, Hk, stop, D]``, not gathered yet."""

    @staticmethod
    def __new__(cls, new, part):
        """Make the tensor that stands for them."""
        batch, heads, _, dim = (new.key, new.value)[part].shape
        length = new.step.stop
        self = torch.Tensor._make_wrapper_subclass(
            cls, (batch, heads, length, dim), (length * heads * dim, dim, heads * dim, 1), dtype=new.key.dtype,
            device=new.key.device,
        )  # fmt: skip
        self.new, self.part = new, part
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Run any operator on the gathered tensors."""
        args, kwargs = tree_map_only(cls, lambda states: states.new.gather()[states.part], (args, kwargs or {}))
        return function(*args, **kwargs)


def attend(query, key, value, mask, softmax_scale, softcap, sinks, causal):
    """``[B, S, H, D]`` of attention to pages; 0 for queries that are padding.

    Args:
        query: ``[B, H, S, D]``.
        key: `PagedStates`.
        value: Whatever came with it.
        mask: As in `Rows.read`.

    Raises:
        NotImplementedError, TypeError, ValueError: this cannot be computed on pages; nothing is lost.
    """
    new = key.new
    rows, step = new.rows, new.step
    new._check_current()
    batch, heads, count, dim = query.shape
    if type(value) is not PagedStates or value.new is not new or (key.part, value.part) != (0, 1):
        raise NotImplementedError("keys and values that were changed after the cache")
    if count != step.stop - step.start or batch != len(rows.sequences):
        raise NotImplementedError("queries that are not the new tokens")
    left = rows.read(step, mask)
    new.write()
    q = query.transpose(1, 2).reshape(batch * count, heads, dim)
    pages = rows.pages
    out = paged_attention(
        q if step.real is None else q[step.real], pages.k[new.layer], pages.v[new.layer], rows.table, rows.lengths,
        cu_seqlens_q=step.cu_seqlens, max_seqlen_q=step.longest, softmax_scale=softmax_scale, causal=causal,
        window_size=(left, -1), softcap=softcap or 0.0, sinks=sinks,
    )  # fmt: skip
    if step.real is not None:
        out = out.new_zeros(batch * count, *out.shape[1:]).index_copy_(0, step.real, out)
    return out.view(batch, count, *out.shape[1:])


def keep_compiler_out():
    """Have `torch.compile` run attention to pages as it is; not at import, as the decorator imports the compiler."""
    global attend
    attend = torch.compiler.disable(attend)

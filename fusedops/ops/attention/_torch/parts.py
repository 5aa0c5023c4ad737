"""What both ways on the CPU share: the options of a call, and its cut into parts and blocks of queries."""

from typing import NamedTuple

import torch

NO_SCORE = float("-inf")
MIN_ROWS = 32  # queries of a block, however many keys there are: fewer would read all keys too often


class Options(NamedTuple):
    """The last arguments of the registered operators."""

    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    mask: torch.Tensor | None
    q_scale: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float

    def simplified(self, num_queries, num_keys):
        """The same without bounds that hide nothing, and causal as the bound that it is."""
        right = 0 if self.causal else self.window_right
        right = -1 if right >= num_queries - 1 else right
        left = -1 if self.window_left >= num_keys - 1 else self.window_left
        return self._replace(causal=False, window_left=left, window_right=right)

    def of_sequence(self, b):
        """The same with row b of every table that has a row for each sequence."""
        rows = {
            name: table if table is None or table.dim() == 1 or table.shape[0] == 1 else table[b : b + 1]
            for name, table in self._asdict().items()
            if name in ("alibi_slopes", "q_scale", "k_scale", "v_scale")
        }
        return self._replace(**rows)


class Part:
    """Some batches and key heads of one call in float32, heads first."""

    def __init__(self, q, k, v, options, batch, kv):
        group = q.shape[2] // k.shape[2]
        self.batch, self.kv, self.heads = batch, kv, slice(kv.start * group, kv.stop * group)
        self.options = options
        self.q, self.k, self.v = (
            self._wide(t, heads, scale)
            for t, heads, scale in (
                (q, self.heads, options.q_scale),
                (k, kv, options.k_scale),
                (v, kv, options.v_scale),
            )
        )
        self.offset = k.shape[1] - q.shape[1]
        self.sinks = None if options.sinks is None else options.sinks[None, self.heads, None, None].float()
        slopes = options.alibi_slopes
        self.slopes = None if slopes is None else self.cut(slopes.view(-1, q.shape[2], 1, 1))
        self.mask = None if options.mask is None else self.cut(options.mask)

    def _wide(self, tensor, heads, scale):
        tensor = tensor[self.batch, :, heads].transpose(1, 2)
        if scale is None:
            return tensor.float()
        return tensor.float() * scale[self.batch if scale.shape[0] > 1 else slice(None), heads, None, None]

    def cut(self, table):
        """This part of [B or 1, H or 1, ...]."""
        table = table[self.batch] if table.shape[0] > 1 else table
        return table[:, self.heads] if table.shape[1] > 1 else table

    def blocks(self, step):
        """(queries, keys) of each block of `step` queries that sees any key, as slices."""
        num_queries, num_keys = self.q.shape[2], self.k.shape[2]
        left, right = self.options.window_left, self.options.window_right
        for start in range(0, num_queries, step):
            stop = min(start + step, num_queries)
            low = 0 if left < 0 else max(start + self.offset - left, 0)
            high = num_keys if right < 0 else min(stop + self.offset + right, num_keys)
            if low < high:
                yield slice(start, stop), slice(low, high)

    def distance(self, rows, keys):
        """How far each key of a block lies to the right of each query."""
        first, last = rows.start + self.offset, rows.stop + self.offset
        positions = torch.arange(first, last, dtype=torch.int32, device=self.q.device)
        return torch.arange(keys.start, keys.stop, dtype=torch.int32, device=self.q.device) - positions[:, None]

    def bias(self, rows, keys):
        """(what is added to the scores of a block, which of them are hidden otherwise); None where there is nothing."""
        added, hidden = None, None
        left, right = self.options.window_left, self.options.window_right
        if self.mask is not None:
            mask = self.mask[:, :, rows] if self.mask.shape[2] > 1 else self.mask
            mask = mask[..., keys] if mask.shape[3] > 1 else mask
            if mask.dtype == torch.bool:
                hidden = ~mask
            else:
                added = mask.float()
        if left < 0 and right < 0 and self.slopes is None:
            return added, hidden
        distance = self.distance(rows, keys)
        if self.slopes is not None:
            slope = self.slopes * -distance.abs()
            added = slope if added is None else slope + added
        if left >= 0:
            hidden = distance < -left if hidden is None else hidden | (distance < -left)
        if right >= 0:
            hidden = distance > right if hidden is None else hidden | (distance > right)
        return added, hidden

    def bias_and_hidden(self, rows, keys):
        """As `bias`, and what an additive mask hides by its -inf is hidden too."""
        added, hidden = self.bias(rows, keys)
        if added is None or self.mask is None or self.mask.dtype == torch.bool:
            return added, hidden
        infinite = added == NO_SCORE
        return added, infinite if hidden is None else hidden | infinite


def parts(q, k, v, options, each):
    """Parts that take at most a unit of memory where one batch and key head take `each` of it."""
    batch, kv_heads = max(k.shape[0], 1), k.shape[2]
    heads = min(max(int(1 / each), 1), kv_heads) if each else kv_heads
    batches = min(max(int(1 / (each * kv_heads)), 1), batch) if each else batch
    for b in range(0, k.shape[0], batches):
        for h in range(0, kv_heads, heads):
            yield Part(q, k, v, options, slice(b, min(b + batches, batch)), slice(h, min(h + heads, kv_heads)))


def keys_of_block(rows, num_keys, options):
    """The most keys that a block of queries can see."""
    if options.window_left < 0 or options.window_right < 0:
        return num_keys
    return min(options.window_left + options.window_right + rows, num_keys)


def outputs(q, v, options):
    """out and lse as for queries that see no key."""
    dtype = torch.bfloat16 if q.element_size() == 1 else q.dtype
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), NO_SCORE, dtype=torch.float32, device=q.device)
    return out, lse if options.sinks is None else lse.copy_(options.sinks[:, None])


def empty_like(tensor):
    """Contiguous memory of a tensor's shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

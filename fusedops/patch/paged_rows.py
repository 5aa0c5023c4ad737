"""A batch that transformers pads to one length, on pages that hold real tokens alone.

transformers counts *columns*: all rows of a batch have as many, padding among them. A row here is a sequence of
`PagedKVCache` with the tokens of its real columns, one after another. What padding there is, is known when the first
attention of a forward has its mask; until then a forward's columns are a `Step` without layout.
"""

from dataclasses import dataclass, field

import torch

from fusedops._core.page_pool import OutOfPages
from fusedops.patch import masks


@dataclass(eq=False)
class Step:
    """The columns ``start`` to ``stop`` that one forward adds, the same for all layers.

    Attributes:
        slots: int64 ``[B * count]``: where each new token goes, -1 for padding; None without layout.
        real: int64: which of the ``B * count`` new tokens are real; None where all are.
        cu_seqlens: int32 ``[B + 1]`` of the real ones; None where each row has one.
        longest: The most new tokens of a row.
        readings: {mask of this forward, by identity: what `Rows.read` found}.
        places: int64 ``[B, stop]``: the slot of every column, once somebody gathers.
    """

    start: int
    stop: int
    slots: torch.Tensor | None = None
    real: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    longest: int = 1
    readings: dict = field(default_factory=dict)
    places: torch.Tensor | None = None


class Rows:
    """The rows of a batch, and the tensors by which operators find their tokens.

    Attributes:
        pages: The `PagedKVCache`.
        filled: Columns of each layer; they differ inside a forward alone.
        sequences: Of `pages`, one for each row.
        columns: Columns that have a layout.
        real: bool ``[B, columns]`` on the host, False where there is padding; None where there is none.
        step: Of the forward that is under way, or the last one.
        pending: What a layer has handed out and nobody has written yet.
        table: int32 ``[B, pages of the longest sequence that is allowed]``; its memory stays while the batch does.
        lengths: int32 ``[B]``, likewise.
    """

    def __init__(self, pages, num_layers):
        self.pages = pages
        self.filled = [0] * num_layers
        self.sequences = []
        self.columns = 0
        self.real = None
        self.step = None
        self.pending = None
        self._stale = True  # any row of the table may be out of date, not only those that take a page

    def begin(self, layer, batch, count):
        """The step in which a layer adds `count` columns."""
        self.settle()
        start = self.filled[layer]
        if not self.sequences:
            self.sequences = [self.pages.allocate()[0] for _ in range(batch)]
            self._make_buffers()
        elif len(self.sequences) != batch:
            raise ValueError(
                f"PagedCache: key_states must have the {len(self.sequences)} rows of the cache, got {batch}; "
                "reset() it for another batch"
            )
        step = self.step
        if step is None or (step.start, step.stop) != (start, start + count):
            if start != self.columns:
                raise RuntimeError(
                    f"PagedCache: layer {layer} must hold as many tokens as the others, {self.columns}, got {start}: "
                    "a forward was cut short; crop() what it added, or reset()"
                )
            step = self.step = Step(start, start + count)
        self.filled[layer] = start + count
        return step

    def settle(self):
        """Write what was handed out and never read."""
        if self.pending is not None:
            self.pending.write()

    def lay_out(self, step, real=None):
        """Give the new columns their slots. OutOfPages: the cache is as before the forward.

        Args:
            step: A step.
            real: bool ``[B, count]`` on the host, False for padding; None where all are real.
        """
        if step.slots is not None:
            return
        count, batch = step.stop - step.start, len(self.sequences)
        if real is not None and bool(real.all()):
            real = None
        counts = [count] * batch if real is None else real.sum(1).tolist()
        before = [self.pages.length(sequence) for sequence in self.sequences]
        try:
            longest = max(map(sum, zip(before, counts)))
            if longest > self.pages.max_length:
                raise OutOfPages(f"PagedCache: a row must have at most {self.pages.max_length} tokens, got {longest}")
            slots = self.pages.append(self.sequences, counts)
        except OutOfPages:
            self._abandon(step)
            raise
        self._describe(step, real, counts, slots)
        self._refresh(before, counts)
        if real is not None or self.real is not None:
            past = torch.ones(batch, step.start, dtype=torch.bool) if self.real is None else self.real
            new = torch.ones(batch, count, dtype=torch.bool) if real is None else real
            self.real = torch.cat((past, new), 1)
        self.columns = step.stop

    def _describe(self, step, real, counts, slots):
        device, count = slots.device, step.stop - step.start
        step.longest = max(counts)
        if real is not None:
            step.real = real.flatten().nonzero()[:, 0].to(device)
            step.slots = torch.full((real.numel(),), -1, dtype=torch.int64, device=device)
            step.slots[step.real] = slots
        else:
            step.slots = self._slots.copy_(slots) if count == 1 else slots
        if real is not None or count != 1:
            sums = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            step.cu_seqlens = sums.to(device)

    def _refresh(self, before, counts):
        """Bring the table up to date where a row has taken a page, and the lengths."""
        size = self.pages.page_size
        grown = [
            row
            for row, (length, count) in enumerate(zip(before, counts))
            if self._stale or -(-(length + count) // size) > -(-length // size)
        ]
        if grown:
            sequences = [self.sequences[row] for row in grown]
            self.table[grown] = self.pages.block_table(sequences, self.table.shape[1])
        self._stale = self._stale and 0 in counts  # who takes no token may still share a page that is copied later
        self.lengths.copy_(self.pages.lengths(self.sequences))

    def _make_buffers(self):
        batch, device = len(self.sequences), self.pages.k.device
        width = -(-self.pages.max_length // self.pages.page_size)
        self.table = torch.zeros(batch, width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._slots = torch.zeros(batch, dtype=torch.int64, device=device)
        self._stale = True

    def _abandon(self, step):
        self.filled = [min(length, step.start) for length in self.filled]
        self.step = self.pending = None
        if step.start == 0:
            self.clear()

    # ---- masks

    def read(self, step, mask):
        """Left bound of the window under which paged attention means what a mask says; lays the step out.

        Args:
            step: A step.
            mask: None, of `masks.make_mask`, or any mask of four dimensions.

        Raises:
            NotImplementedError: the keys must be gathered for this mask.
            RuntimeError: the mask shows padding of earlier calls, whose keys were not kept.
        """
        if mask not in step.readings:
            step.readings[mask] = self._read(step, mask)
        reading = step.readings[mask]
        if isinstance(reading, str):
            raise NotImplementedError(reading)
        return reading

    def _read(self, step, mask):
        left, real = -1, None
        if mask is not None:
            if mask.dtype is not masks.SHORT:
                self.lay_out(step)
                self._check_kept(_shown(mask, self.columns))
                return "a dense mask over pages"
            rows, length = mask.shape[2:]
            if length != step.stop:
                self.lay_out(step)
                return "a mask of another length than the cache"
            left = rows - length - 1 if rows < 2 * length else -1
            if mask.shape[1]:
                real = mask[:, 0, 0].cpu().view(torch.bool).expand(len(self.sequences), -1)
        self.lay_out(step, None if real is None else real[:, step.start :])
        if real is None and self.real is None:
            return left
        everything = torch.ones(len(self.sequences), step.stop, dtype=torch.bool)
        real, kept = everything if real is None else real, everything if self.real is None else self.real
        self._check_kept(real)
        if not torch.equal(real, kept):
            return "a mask that hides tokens of the cache"
        if bool((~real & (real.cumsum(1) > 0))[:, step.start :].any()):
            return "padding after a token"  # its queries see keys, and generate goes on from the last column
        begins = (kept[:, 1:] & ~kept[:, :-1]).sum(1) + kept[:, 0]
        if left >= 0 and bool((begins > 1).any()):
            return "a window across padding"  # it counts columns, pages hold tokens
        return left

    def _check_kept(self, shown):
        if self.real is not None and bool((shown & ~self.real[:, : shown.shape[1]]).any()):
            raise RuntimeError(
                "PagedCache: attention_mask must keep hiding what was padding in earlier calls, got 1 where it had 0: "
                "no keys were kept for that"
            )

    # ---- the whole batch

    def places(self, step):
        """int64 ``[B, stop]``: the slot of every column, of padding that of some other."""
        if step.places is None:
            device, size = self.table.device, self.pages.page_size
            if self.real is None:
                positions = torch.arange(step.stop, device=device).expand(len(self.sequences), -1)
            else:
                positions = (self.real.cumsum(1) - 1).clamp(min=0).to(device)
            step.places = self.table.gather(1, positions // size).long() * size + positions % size
        return step.places

    def select(self, rows):
        """Make the batch of these rows, in this order; one that is named twice shares its pages until it goes on."""
        self.settle()
        if not self.sequences:
            return
        taken, chosen = set(), []
        for row in rows:
            sequence = self.sequences[row]
            chosen.append(self.pages.fork(sequence) if sequence in taken else sequence)
            taken.add(sequence)
        self.pages.free(*(sequence for sequence in self.sequences if sequence not in taken))
        resized = len(chosen) != len(self.sequences)
        self.sequences, self.step, self._stale = chosen, None, True
        self.real = None if self.real is None else self.real[rows]
        if resized:
            self._make_buffers()

    def crop(self, columns):
        """Forget all columns from `columns` on."""
        self.settle()
        if columns < self.columns:
            for row, sequence in enumerate(self.sequences):
                left = columns if self.real is None else int(self.real[row, :columns].sum())
                self.pages.truncate(sequence, left)
            self.real = None if self.real is None else self.real[:, :columns]
            self.columns, self.step, self._stale = columns, None, True
        self.filled = [min(length, columns) for length in self.filled]

    def clear(self):
        """Give all pages back."""
        self.pages.free(*self.sequences)
        self.filled = [0] * len(self.filled)
        self.sequences, self.columns, self.real, self.step, self.pending = [], 0, None, None, None


def _shown(mask, columns):
    """bool ``[B or 1, columns]`` on the host: which keys a dense mask shows to some query."""
    mask = mask[..., :columns]
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown.flatten(1, 2).any(1).cpu()

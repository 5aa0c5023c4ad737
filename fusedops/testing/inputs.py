"""Seeded and hostile inputs: layouts, storage offsets, special values, and strides beyond 2**31 elements."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

_PADDING = 3  # columns of slack in a padded row; odd, so that rows start at every alignment


def make_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    seed: int,
    magnitude: float = 1.0,
    layout: str = "contiguous",
    specials: Sequence[float] = (),
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Make a tensor of seeded normal values in a chosen memory layout.

    Memory between the rows is filled with NaN (integers: the smallest value), so that a kernel that reads it shows.
    The values depend on shape, dtype, seed, magnitude and specials alone: the same for each layout and device,
    except "expanded", which repeats the first slice. The global random state is neither read nor changed.

    Args:
        shape: The shape.
        dtype: A floating dtype (values ``magnitude * normal``, clipped to the finite range) or an integer one
            (uniform in ``[-magnitude, magnitude]``, cut to the dtype's range).
        seed: Any integer.
        magnitude: The scale of the values.
        layout: "contiguous"; "padded": rows in a wider buffer; "sliced": every second row of a larger buffer;
            "offset:<k>": contiguous, k elements into its storage; "expanded": the first dimension has stride 0;
            "transposed": the first two of at least three dimensions swapped in memory.
            In all of these the last dimension is contiguous. "strided": it is not, for tests of what must be refused.
        specials: Values written at random places; if there are more than elements, the first ones.
        device: Where the tensor lives.

    Returns:
        The tensor.

    Raises:
        ValueError: the layout is unknown or does not fit the shape.
    """
    shape = tuple(int(size) for size in shape)
    values = _values(shape, dtype, seed, magnitude, specials)
    return _place(values, layout, torch.device(device))


def special_values(dtype: torch.dtype) -> tuple[float, ...]:
    """Return the values of a floating dtype where kernels go wrong.

    Args:
        dtype: A floating dtype.

    Returns:
        Both zeros, the smallest denormal and normal, 1 and its neighbours, the largest number, and, where the dtype
        has them, the infinities and NaN.
    """
    info = torch.finfo(dtype)
    denormal = info.tiny * info.eps
    values = [0.0, -0.0, denormal, -denormal, info.tiny, -info.tiny]
    values += [1.0, -1.0, 1.0 + info.eps, 1.0 - info.eps / 2, info.max, info.min]
    values += [value for value in (math.inf, -math.inf) if _holds_infinity(dtype)]
    return (*values, math.nan)


def hostile_rows(num_columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Make the rows that break reductions and normalisations.

    Args:
        num_columns: The length of a row, at least 1.
        dtype: A floating dtype.

    Returns:
        Name to row ``[num_columns]``: all zeros, equal values, one-hot, denormal, largest, alternating sign,
        growing by powers of two, one NaN, one inf, all -inf (the last two where the dtype has infinities).
    """
    info = torch.finfo(dtype)
    position = num_columns // 2
    ramp_bits = torch.arange(num_columns).remainder(9).sub(4).double()

    def full(value: float) -> torch.Tensor:
        return torch.full((num_columns,), value, dtype=torch.float64)

    def single(background: float, value: float) -> torch.Tensor:
        row = full(background)
        row[position] = value
        return row

    rows = {
        "zeros": full(0.0),
        "negative zeros": full(-0.0),
        "equal": full(1.0 + info.eps),
        "one-hot": single(0.0, 1.0),
        "one-hot largest": single(0.0, info.max),
        "denormal": full(info.tiny * info.eps),
        "largest": full(info.max),
        "alternating": full(1.0) - 2.0 * torch.arange(num_columns).remainder(2).double(),
        "powers of two": torch.exp2(ramp_bits),
        "one NaN": single(1.0, math.nan),
    }
    if _holds_infinity(dtype):
        rows["one inf"] = single(1.0, math.inf)
        rows["all -inf"] = full(-math.inf)
    return {name: row.to(dtype) for name, row in rows.items()}


def huge_stride_rows(
    values: torch.Tensor, *, last_offset: int = 2**31, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Copy a matrix into rows so far apart that the last one starts about `last_offset` elements after the first.

    On the CPU the memory is mapped, and only the pages of the rows themselves are ever committed: two rows across
    2**31 bfloat16 elements cost a few megabytes. What lies between reads as zero.

    Args:
        values: ``[rows, columns]``, at least two rows.
        last_offset: The least offset of the last row in elements; with ``k * (rows - 1)`` it is exact.
        device: A GPU really allocates the whole span.

    Returns:
        A tensor equal to `values` whose first stride is ``ceil(last_offset / (rows - 1))``.

    Raises:
        ValueError: `values` is no matrix of two rows or more, or the rows would overlap.
    """
    if values.dim() != 2 or values.shape[0] < 2:
        raise ValueError(f"huge_stride_rows: values must have shape [rows >= 2, columns], got {list(values.shape)}")
    rows, columns = values.shape
    stride = -(-last_offset // (rows - 1))
    if stride < columns:
        raise ValueError(f"huge_stride_rows: last_offset must be at least {columns * (rows - 1)}, got {last_offset}")
    num_elements = stride * (rows - 1) + columns
    device = torch.device(device)
    if device.type == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, num_elements * values.element_size(), flags=flags)
        buffer = torch.frombuffer(memory, dtype=values.dtype)
    else:
        buffer = torch.zeros(num_elements, dtype=values.dtype, device=device)
    spread = buffer.as_strided((rows, columns), (stride, 1))
    for index in range(rows):
        spread[index].copy_(values[index])
    return spread


def _holds_infinity(dtype: torch.dtype) -> bool:
    return bool(torch.tensor(math.inf, dtype=torch.float32).to(dtype).double().isinf())


def _values(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, magnitude: float, specials: Sequence[float]
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude
        values = values.clamp(-largest, largest).to(dtype)
    elif dtype == torch.bool:
        values = torch.randint(0, 2, shape, generator=generator).to(dtype)
    else:
        info = torch.iinfo(dtype)
        low, high = max(info.min, -int(magnitude)), min(info.max, int(magnitude))
        values = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64).to(dtype)
    count = min(len(specials), values.numel())
    if count:
        places = torch.randperm(values.numel(), generator=generator)[:count]
        values.view(-1)[places] = torch.tensor(list(specials[:count]), dtype=torch.float64).to(dtype)
    return values


def _slack(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer that no kernel should read: NaN, or the smallest integer."""
    if dtype.is_floating_point:
        return torch.full((size,), math.nan, dtype=torch.float32).to(dtype).to(device)
    fill = False if dtype == torch.bool else torch.iinfo(dtype).min
    return torch.full((size,), fill, dtype=dtype, device=device)


def _place(values: torch.Tensor, layout: str, device: torch.device) -> torch.Tensor:
    """Copy contiguous CPU values into a view with the named layout."""
    kind, _, argument = layout.partition(":")
    shape, dims = tuple(values.shape), values.dim()
    needed = {"padded": 1, "sliced": 1, "expanded": 2, "transposed": 3, "strided": 1}.get(kind, 0)
    if dims < needed:
        raise ValueError(f"make_tensor: layout {layout!r} must have at least {needed} dimensions, got {list(shape)}")
    if kind == "offset" and (not argument.isdecimal()):
        raise ValueError(f"make_tensor: layout must be 'offset:<elements>', got {layout!r}")

    if kind == "contiguous":
        return values.to(device)
    if kind == "expanded":
        return values[:1].to(device).expand(shape)
    if kind == "transposed":
        return values.transpose(0, 1).contiguous().to(device).transpose(0, 1)
    if kind == "offset":
        view = _slack(int(argument) + values.numel(), values.dtype, device)[int(argument) :].view(shape)
    elif kind == "padded":
        width = shape[-1] + _PADDING
        rows = values.numel() // shape[-1] if shape[-1] else math.prod(shape[:-1])
        view = _slack(rows * width, values.dtype, device).view(*shape[:-1], width)[..., : shape[-1]]
    elif kind == "sliced" and dims > 1:
        wide = (*shape[:-2], 2 * shape[-2], shape[-1])
        view = _slack(2 * values.numel(), values.dtype, device).view(wide)[..., ::2, :]
    elif kind == "sliced":
        view = _slack(shape[0] + 2, values.dtype, device)[1:-1]
    elif kind == "strided":
        view = _slack(2 * values.numel(), values.dtype, device).view(*shape[:-1], 2 * shape[-1])[..., ::2]
    else:
        raise ValueError(f"make_tensor: layout must be one of those in the docstring, got {layout!r}")
    view.copy_(values)
    return view

"""Products for the wgmma.sp kernel: operands, the truth, and launches of one configuration in the emulator."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fusedops import compress_24, decompress_24
from fusedops._core.device import EMULATED
from fusedops.ops.sparse_matmul._cuda import wgmma
from fusedops.ops.sparse_matmul._cuda.epilogue import Epilogue
from fusedops.testing.ptx.launches import diverted

FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.int8, FP8)
TILES = [(dtype, block_m) for dtype in DTYPES for block_m in wgmma.widths(dtype)]
ACTIVATIONS = {
    None: lambda x: x, "relu": F.relu, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@dataclass
class Problem:
    """Operands of one call."""

    a: torch.Tensor
    values: torch.Tensor
    metadata: torch.Tensor
    out_dtype: torch.dtype
    scale_a: torch.Tensor | None = None
    scale_b: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    activation: str | None = None

    def truth(self):
        """In float64."""
        weight = decompress_24(self.values, self.metadata, in_features=self.a.shape[1])
        x = self.a.double() @ weight.double().T
        if self.scale_a is not None:
            x = x * self.scale_a.double().reshape(-1, 1)
        if self.scale_b is not None:
            x = x * self.scale_b.double()
        if self.bias is not None:
            x = x + self.bias.double()
        return ACTIVATIONS[self.activation](x)

    def run(self, block_m, blocks=3, group_n=8, schedules="default"):
        """The kernel's result, by so many blocks."""
        limits = replace(EMULATED["sm_90a"], sm_count=blocks)
        assert wgmma.rejection(limits, self.a, self.values, self.metadata) is None
        out = torch.full((self.a.shape[0], self.values.shape[0]), torch.nan, dtype=self.out_dtype)
        epilogue = Epilogue.of(self.scale_a, self.scale_b, self.bias, self.out_dtype, self.activation)
        tile = wgmma.WgmmaConfig(block_m, group_n)
        with diverted(target="sm_90a", schedules=schedules):
            wgmma.launch(tile, limits, self.a, self.values, self.metadata, epilogue, out)
        return out


def weight(n, k, generator, draw):
    """[n, k] of draws, of which two in each four are kept, one or none where the draw is zero; all six pairs occur."""
    order = torch.rand(n, -(-k // 4), 4, generator=generator).argsort(-1).argsort(-1)
    return torch.where(order.view(n, -1)[:, :k] < 2, draw(n, k), 0.0)


def problem(dtype, m, n, k, out_dtype=torch.bfloat16, random=False, pitch=16, **options):
    """Small integers, of which every sum is exact, or random values. Rows of a are `pitch` bytes apart, or a multiple.

    Columns beyond K hold NaN, or the largest integer.
    """
    generator = torch.Generator().manual_seed(m * n + k)

    def draw(*shape):
        if random:
            return torch.randn(shape, generator=generator) * (40 if dtype == torch.int8 else 1)
        return torch.randint(-3, 4, shape, generator=generator).float()

    item = dtype.itemsize
    room = torch.full((m, -(-k * item // pitch) * pitch // item), 127 if dtype == torch.int8 else torch.nan)
    room[:, :k] = draw(m, k).clamp(-127, 127)
    values, metadata = compress_24(weight(n, k, generator, draw).clamp(-127, 127).to(dtype))
    return Problem(room.to(dtype)[:, :k], values, metadata, out_dtype, **options)

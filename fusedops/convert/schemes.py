"""The ways to quantise a model: which module takes a linear's place, and with which options."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fusedops.nn import Fp8Linear, Int8Linear, Sparse24Linear, WeightOnlyLinear
from fusedops.ops.quantize_int4 import GROUPS
from fusedops.ops.scaled_matmul import MAX_K_INT8


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a linear.

    Attributes:
        name: What `fusedops.quantize_` calls it.
        module: The class of `fusedops.nn` that takes the linear's place.
        options: Its keyword arguments beyond those of `torch.nn.Linear`.
        quantizes_activations: Whether the products are of narrow operands on both sides.
        max_in_features: The largest K, None where there is none.
        sparse_format: Of a linear that is 2:4 sparse: the format that `Sparse24Linear` gets; None where there is none.
        status: What a report says of a linear with it.
    """

    name: str
    module: type
    options: dict = field(default_factory=dict)
    quantizes_activations: bool = False
    max_in_features: int | None = None
    sparse_format: str | None = None
    status: str = "quantized"

    @property
    def stores_codes(self):
        """Whether the stored weight is of another dtype than the one it stands for."""
        return self.module.layout(1, 1, torch.float32, **self.options)["weight"][1] != torch.float32

    def module_for(self, linear):
        """(class, options) of what takes the place of a linear."""
        if isinstance(linear, Sparse24Linear):
            return Sparse24Linear, {**linear.options, "format": self.sparse_format}
        return self.module, self.options

    def stored_bytes(self, out_features, in_features, dtype, linear=None):
        """Bytes of the codes and scales of a weight ``[out_features, in_features]``, that of a plain linear or this."""
        module, options = self.module_for(linear)
        stored = module.layout(in_features, out_features, dtype, **options).values()
        return sum(math.prod(shape) * kind.itemsize for shape, kind in stored)

    def obstacle(self, linear):
        """Why this scheme does not take a `torch.nn.Linear`, or one that is 2:4 sparse, or None."""
        is_sparse = isinstance(linear, Sparse24Linear)
        if is_sparse and self.sparse_format is None:
            return f"2:4 sparse, for which {self.name!r} has no product"
        N, K = (linear.out_features, linear.in_features) if is_sparse else linear.weight.shape
        dtype = linear.weight.dtype
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"its weight is {str(dtype).removeprefix('torch.')}, not float16, bfloat16 or float32"
        if not N or not K:
            return "its weight is empty"
        if self.max_in_features is not None and K > self.max_in_features:
            return f"in_features {K} > {self.max_in_features}, where sums leave int32"
        before, after = num_bytes(stored_tensors(linear)), self.stored_bytes(N, K, dtype, linear)
        if after >= before:
            return f"too small: {after} bytes with its scales, {before} as it is"
        return None

    def convert(self, linear):
        """The quantised module of a `torch.nn.Linear`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{self.name}: linear must be a torch.nn.Linear, got {type(linear).__name__}")
        return self.module.from_linear(linear, **self.options)


SPARSITY = "2:4"
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", Int8Linear, quantizes_activations=True, max_in_features=MAX_K_INT8, sparse_format="int8"),
        Scheme("fp8", Fp8Linear, quantizes_activations=True, sparse_format="fp8"),
        Scheme("int8-weight-only", WeightOnlyLinear, {"format": "int8"}),
        Scheme("fp8-weight-only", WeightOnlyLinear, {"format": "fp8"}),
        Scheme("int4-weight-only", WeightOnlyLinear, {"format": "int4", "group_size": 32}),
    )
}


def find_scheme(op, name, group_size=None):
    """The Scheme of a name, with another group size where one is given.

    Args:
        op: Who asks, for the message.
        name: A key of SCHEMES.
        group_size: Columns of a row that share a scale, for weight-only schemes: 32, 64 or 128. None is the scheme's
            own: 32 for int4, one scale for each row otherwise.

    Raises:
        ValueError: no such scheme, or one that does not take this group size.
    """
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"{op}: scheme must be one of {', '.join(map(repr, SCHEMES))}, got {name!r}")
    scheme = SCHEMES[name]
    if group_size is None:
        return scheme
    if scheme.quantizes_activations:
        raise ValueError(f"{op}: group_size must be None for {name!r}, got {group_size!r}")
    if isinstance(group_size, bool) or group_size not in GROUPS:
        raise ValueError(f"{op}: group_size must be None or one of {', '.join(map(str, GROUPS))}, got {group_size!r}")
    return replace(scheme, options={**scheme.options, "group_size": int(group_size)})


def sparse_scheme(dense_below=None, format=None):
    """What `fusedops.sparsify_` does to a linear; the options are those of `Sparse24Linear`."""
    options = Sparse24Linear.checked(format=format, dense_below=dense_below)
    name = SPARSITY if format is None else f"{SPARSITY} {format}"
    return Scheme(name, Sparse24Linear, options, status="sparsified")


def stored_tensors(linear):
    """What holds the weight of an embedding or a linear, plain, quantised or sparse: everything but its bias."""
    if isinstance(linear, nn.Linear | nn.Embedding):
        return [linear.weight]
    tensors = {**linear._parameters, **linear._buffers, "bias": None}.values()
    return [tensor for tensor in tensors if tensor is not None]


def plain_weight(linear):
    """The weight ``[N, K]`` of a plain linear or a sparse one of float values."""
    return linear.decompress() if isinstance(linear, Sparse24Linear) else linear.weight.detach()


def num_bytes(tensors):
    """Bytes of the elements of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

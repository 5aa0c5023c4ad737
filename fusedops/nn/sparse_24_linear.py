"""A linear layer whose weight is stored compressed, with 2 of every 4 consecutive columns."""

import torch
import torch.nn.functional as F

from fusedops._core import checks, invariance
from fusedops._core.numbers import ceil_div
from fusedops._core.register import operators
from fusedops.nn._linear import beside, direct
from fusedops.nn.quantized_linear import QuantizedLinear
from fusedops.nn.scaled_linear import Fp8Linear, Int8Linear
from fusedops.ops.compress_24 import compress_24, decompress_24, prune_24
from fusedops.ops.sparse_matmul import MAX_K_INT8, sparse_matmul
from fusedops.ops.sparse_matmul._crossover import is_sparse

DENSE = {"int8": Int8Linear, "fp8": Fp8Linear}  # by the names of formats, the dense layers with the same codes
MEASURED = "measured"
EMPTY = 0x44  # metadata of two groups with the places 0 and 1
_sparse_matmul = operators()["sparse_matmul"]


def check_dense_below(op, rows):
    """Raise ValueError where the option of that name is no number of rows, and not "measured"."""
    if rows not in (None, MEASURED) and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f'{op}: dense_below must be None, "{MEASURED}" or a number of rows from 1, got {rows!r}')


class Sparse24Linear(QuantizedLinear):
    """Multiply by a weight of which 2 in every 4 consecutive columns of a row are stored, the others being 0.

    ``out = x @ weight.T + bias``; with 8-bit values ``out = (codes(x) @ weight.T) * scale(x) * weight_scale + bias``,
    in place of ``torch.nn.Linear``

    Args:
        in_features, out_features, bias, device, dtype: As in ``torch.nn.Linear``, any numbers from 1. The weight is 0
            until it is loaded; `from_linear` compresses one.
        format: None for values of the layer's dtype, ``"int8"`` or ``"fp8"`` (e4m3) for codes, with inputs quantised as
            in `Int8Linear` and `Fp8Linear`.
        dense_below: Calls with fewer rows than this multiply by a dense copy of the weight, which is kept beside, not
            stored in a state dict, and made again when one is loaded. ``"measured"`` takes the copy for the numbers of
            rows for which `fusedops.crossover.tune_crossover` found it to be faster here; without that it takes
            the compressed weight. None keeps no copy.

    Stored, and only bias is trained: ``weight`` ``[1, N, ceil(K / 64) * 32]`` of the layer's dtype, int8 or
    float8_e4m3fn, so that nobody takes it for a plain layer's, and ``metadata`` uint8 ``[N, ceil(K / 128) * 16]``, as
    `fusedops.compress_24` gives them; ``weight_scale`` float32 ``[N]``, of codes alone; ``bias`` ``[N]`` or None.

    Raises:
        ValueError: a size is below 1, or an option is none of these.
        NotImplementedError: in_features > MAX_K_INT8 with int8, where sums leave int32.

    Numerics: the product as by `fusedops.sparse_matmul`; codes as by `fusedops.quantize_int8` and `quantize_fp8` of the
        pruned weight, whose zeros stay zeros. ``.to(dtype)`` rounds values of format None, as a plain layer's weight,
        and bias, and no code, scale or metadata. Values of another dtype than x are converted to x's at every call.
    From: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, https://arxiv.org/abs/2104.08378
    """

    OPTIONS = {"format": None, "dense_below": None}

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, format=None,
                 dense_below=None):  # fmt: skip
        if format == "int8" and in_features > MAX_K_INT8:
            raise NotImplementedError(
                f"Sparse24Linear: in_features must be at most MAX_K_INT8 = {MAX_K_INT8}, got {in_features}"
            )
        options = {"format": format, "dense_below": dense_below}
        super().__init__(in_features, out_features, bias, device, dtype, **options)
        with torch.no_grad():
            self.metadata.fill_(EMPTY)
        dense = None
        if dense_below is not None:
            dense = torch.zeros(out_features, in_features, dtype=self.weight.dtype, device=device)
        self.register_buffer("dense", dense, persistent=False)

    @property
    def KEPT(self):
        """See `QuantizedLinear`: values of the layer's dtype follow it."""
        return ("metadata",) if self.options["format"] is None else ("metadata", "weight", "weight_scale", "dense")

    @classmethod
    def checked(cls, **options):
        """See `QuantizedLinear.checked`."""
        options = super().checked(**options)
        checks.check_choice(cls.__name__, "format", options["format"], (None, *DENSE))
        check_dense_below(cls.__name__, options["dense_below"])
        return options

    @classmethod
    def _layout(cls, in_features, out_features, dtype, *, format, dense_below):
        stored = dtype if format is None else DENSE[format].CODE
        found = {
            "weight": ((1, out_features, ceil_div(in_features, 64) * 32), stored),
            "metadata": ((out_features, ceil_div(in_features, 128) * 16), torch.uint8),
        }
        return found if format is None else found | {"weight_scale": ((out_features,), torch.float32)}

    @classmethod
    def _quantized(cls, weight, options):
        scale = {}
        if options["format"] is not None:
            weight, found = DENSE[options["format"]].quantize(weight)
            scale["weight_scale"] = found
        values, metadata = compress_24(weight)
        return {"weight": values[None], "metadata": metadata, **scale}

    @classmethod
    def from_linear(cls, linear, *, prune=False, scores=None, format=None, dense_below=None):
        """A layer with the compressed weight of a ``torch.nn.Linear``, whose bias it shares.

        Args:
            linear: The layer, which is not changed.
            prune: Drop the smaller 2 of every 4 weights; without it, and without scores, the weight must be 2:4
                already.
            scores: ``[N, K]``: of each 4 the 2 with the largest score are kept, as in `fusedops.prune_24`.
            format, dense_below: As in the constructor.

        Raises:
            TypeError: `linear` is not a ``torch.nn.Linear``.
            ValueError: the weight is not 2:4 and shall not be pruned (the first such group is named), or an option does
                not fit.
        """
        if not prune and scores is None:
            return super().from_linear(linear, format=format, dense_below=dense_below)
        cls.check_linear(linear)
        options = cls.checked(format=format, dense_below=dense_below)
        weight = prune_24(linear.weight.detach(), scores=scores)
        return cls._of(linear, cls.quantize_weight(weight, **options), options)

    def decompress(self, dtype=None):
        """The weight ``[N, K]``, of codes times their scale, rounded to `dtype`, by default to the layer's."""
        return self.dequantize(dtype)

    def take(self, stored):
        """See `QuantizedLinear.take`; the dense copy is made anew."""
        super().take(stored)
        self._refresh()

    def _refresh(self):
        if self.dense is not None:
            values, metadata = self.weight.detach()[0], self.metadata.detach()
            self.dense = decompress_24(values, metadata, in_features=self.in_features)

    def operands(self, x):
        """See `QuantizedLinear.operands`: beside the parameters a dense weight, where x has few rows."""
        below, rows = self.options["dense_below"], x.numel() // self.in_features
        if below is None or invariance.enabled():
            return self._parameters
        if below == MEASURED:
            sparse = is_sparse(rows, self.out_features, self.in_features, self.weight.dtype, x.device)
        else:
            sparse = rows >= below
        if sparse:
            return self._parameters
        return {**self._parameters, "dense": self.dense}

    @classmethod
    def compute(cls, x, parameters):
        """See `QuantizedLinear.compute`; with ``dense`` among the parameters by that."""
        dense, values = parameters.get("dense"), parameters["weight"]
        if parameters.get("weight_scale") is None:
            return cls._product(x, parameters, dense), None, None
        layer = Int8Linear if values.dtype is torch.int8 else Fp8Linear
        if dense is not None:
            return layer.compute(x, {**parameters, "weight": dense[None]})
        codes, scale = layer.quantized_rows(x, parameters)
        out = cls._scaled_product(codes, scale, parameters, x.dtype, direct(_sparse_matmul, x))
        return out.view(*x.shape[:-1], out.shape[-1]), codes, scale

    @staticmethod
    def _product(x, parameters, dense):
        bias = parameters["bias"]
        if dense is not None:
            return F.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
        values, metadata = parameters["weight"][0].to(x.dtype), parameters["metadata"]
        bias, run = beside(x.dtype, bias), direct(_sparse_matmul, x)
        if run is None:
            return sparse_matmul(x, values, metadata, bias=bias)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        out = run(rows, values, metadata, None, None, bias, x.dtype, None)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def _scaled_product(codes, scale, parameters, out_dtype, run=None):
        values, metadata, weight_scale = parameters["weight"][0], parameters["metadata"], parameters["weight_scale"]
        bias = beside(out_dtype, parameters["bias"])
        if run is not None:
            return run(codes, values, metadata, scale, weight_scale, bias, out_dtype, None)
        options = {"scale_a": scale, "scale_b": weight_scale, "bias": bias, "out_dtype": out_dtype}
        return sparse_matmul(codes, values, metadata, **options)

    def forward_quantized(self, values, scale, out_dtype):
        """Multiply an input that is quantised already, of a format that has codes. The result has no derivative.

        Args:
            values: ``[..., K]``, codes of the weight's dtype with a contiguous last dimension.
            scale: float32, one number (``[]`` or ``[1]``) or one for each row ``[...]``.
            out_dtype: float16, bfloat16 or float32.

        Returns:
            ``[..., N]`` of `out_dtype`.

        Raises:
            ValueError: a shape or device does not fit.
            TypeError: a dtype is not one of the above.
        """
        return self._scaled_product(values, scale, self._parameters, out_dtype)

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._refresh()

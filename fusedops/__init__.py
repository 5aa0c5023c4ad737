"""fusedops: fused GPU operators for LLM inference. One import line per operator; importing needs torch alone."""

from fusedops._core.dispatch import FallbackWarning, counters, fallbacks, reset_counters
from fusedops._core.explain import Explanation, explain
from fusedops._core.inspection import Inspection, inspect
from fusedops._core.invariance import batch_invariant
from fusedops._core.pairs import interleave_rows
from fusedops._core.register import operators as _operators
from fusedops.convert import distill_, fake_quantize_, quantize_, sparsify_
from fusedops.kv_cache import OutOfPages, PagedKVCache
from fusedops.ops.attention import attention, attention_varlen, merge_attention
from fusedops.ops.compress_24 import compress_24, decompress_24, is_24, prune_24
from fusedops.ops.gated_activation import gelu_mul, silu_mul, silu_mul_quantized
from fusedops.ops.layer_norm import add_layer_norm, layer_norm
from fusedops.ops.paged_attention import paged_attention
from fusedops.ops.quantize import quantize_fp8, quantize_int8
from fusedops.ops.quantize_int4 import quantize_int4
from fusedops.ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_,
    add_rms_norm_quantized,
    rms_norm,
    rms_norm_quantized,
)
from fusedops.ops.rotary import rotary
from fusedops.ops.scaled_matmul import fp8_matmul, int8_matmul
from fusedops.ops.sparse_matmul import sparse_matmul
from fusedops.ops.weight_only_matmul import weight_only_matmul
from fusedops.ops.write_kv_cache import rotary_write_kv_cache, write_kv_cache
from fusedops.patch import patched, unpatch
from fusedops.tuning import tune
from fusedops.warm import WarmUp, warmup

__version__ = "0.1.0"

# Those with kernels; pruning and compressing a weight are torch's operators on every device.
OPERATORS = tuple(sorted(name for name, operator in _operators().items() if name in globals() and operator.has_kernels))

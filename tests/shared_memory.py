"""At most how many bytes of shared memory each kernel asks for, by the arithmetic of its tile.

`test_compile.py` compares it with what compiled examples really ask for, `test_defaults.py` with what devices have.
"""

import re
from dataclasses import dataclass

import torch

from fusedops.ops.attention import _triton as attention
from fusedops.ops.paged_attention import _triton as paged
from fusedops.ops.scaled_matmul import _triton as scaled
from fusedops.ops.sparse_matmul import _triton as sparse

SLACK = 2048  # sums over warps, rows of numbers beside the tiles, barriers
_BYTES = {"fp32": 4, "i32": 4, "fp16": 2, "bf16": 2, "i8": 1, "u8": 1, "fp8e4nv": 1, "fp8e5": 1, "i1": 1, "i64": 8}


@dataclass(frozen=True)
class Described:
    """A launch, or an example of one.

    Attributes:
        kernel: The kernel's name.
        values: Compile-time parameters by name.
        bytes: Size of an element of what each pointer or tensor map leads to, by name; those left out are missing.
        num_stages: Launch option.
        limits: The device.
    """

    kernel: str
    values: dict
    bytes: dict
    num_stages: int
    limits: object

    def __getitem__(self, name):
        return int(self.values[name])

    @property
    def is_asynchronous(self):
        """Whether products read shared memory while the next tile is on its way into it."""
        return 90 <= self.limits.capability < 120

    @property
    def tiles(self):
        """Tiles of a pipelined loop that are there together."""
        return self.num_stages if self.is_asynchronous else max(self.num_stages - 1, 1)


def from_row(row, limits):
    """What the compile worker says of an example."""
    sizes, columns = {}, {}
    for name, kind in row["types"].items():
        found = re.match(r"\*(\w+)|tensordesc<(\w+)\[([\d,]+)\]", kind)
        if found:
            sizes[name] = _BYTES[found[1] or found[2]]
        if found and found[3]:
            columns[f"{name} columns"] = found[3].rpartition(",")[2]
    return Described(row["kernel"], row["constants"] | columns, sizes, row["num_stages"], limits)


def from_launch(launch, limits):
    """What a launcher asked for."""
    names = launch.kernel.arg_names
    values = {**dict(zip(names, launch.arguments)), **launch.keywords}
    sizes, columns = {}, {}
    for name, value in list(values.items()):
        if isinstance(value, torch.Tensor):
            sizes[name] = value.element_size()
        elif hasattr(value, "block_shape"):
            sizes[name], columns[f"{name} columns"] = value.base.element_size(), value.block_shape[-1]
    return Described(launch.kernel.fn.__name__, values | columns, sizes, values.get("num_stages", 1), limits)


def shared_memory(launch):
    """At most what a launch asks for, in bytes. A kernel that is not listed below has no tiles in shared memory."""
    return _ESTIMATES.get(launch.kernel, lambda _: SLACK)(launch)


def _tile(*names):
    """Kernels whose programs reduce or lay out anew one tile of float32 values."""

    def estimate(launch):
        size = 4
        for name in names:
            size *= launch[name]
        return size + SLACK

    return estimate


def _attention(launch):
    tile = attention.AttentionConfig(
        launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_D"], launch["BLOCK_DV"], 4, launch.num_stages
    )
    return attention.shared_bytes(tile, launch.bytes["q_ptr"], launch.values["MASK_KIND"] != "none")


def _paged(launch):
    tile = paged.PagedConfig(
        launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_D"], launch["BLOCK_DV"], 4, launch.num_stages
    )
    window, tree = (str(launch.values[name]) == "True" for name in ("HAS_LEFT", "HAS_TREE"))
    return paged.shared_bytes(tile, launch.bytes["q_ptr"], launch.bytes["k_ptr"], window, tree, launch.limits)


def _backward(resident, moving):
    """A tile of two tensors that stays, tiles of two others on their way, two of products, masks, rows of numbers."""

    def estimate(launch):
        size = launch.bytes["q_ptr"]
        width = (launch["BLOCK_D"] + launch["BLOCK_DV"]) * size
        product = launch["BLOCK_M"] * launch["BLOCK_N"]
        has_mask = launch.values["MASK_KIND"] != "none" and launch.num_stages > 1  # else it goes to registers at once
        mask = launch.tiles * product * 4 * has_mask
        # mma.sync takes one of the products from registers
        products = product * size * (2 if launch.is_asynchronous or size == 4 else 1)
        rows = launch.tiles * launch["BLOCK_M"] * 8 + 512
        return launch[resident] * width + launch.tiles * launch[moving] * width + products + mask + rows

    return estimate


def _attention_hopper(launch):
    """Q's tile, the rings of keys and values, and the result's where it does not leave through Q's, and barriers."""
    groups, stages, block_n = launch["NUM_GROUPS"], launch["NUM_STAGES"], launch["BLOCK_N"]
    narrow, wide = launch.bytes["q_desc"], launch.bytes["v_desc"]
    width, width_v = launch["q_desc columns"], launch["v_desc columns"]
    queries = groups * 64 * width * narrow
    out = 0 if str(launch.values["OUT_IN_Q"]) == "True" else groups * 64 * width_v * wide
    return queries + stages * block_n * (width * narrow + width_v * wide) + out + 512


def _scaled(kernel):
    def estimate(launch):
        tile = scaled.MatmulConfig(
            kernel, launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"], 4, launch.num_stages
        )
        return scaled.shared_bytes(tile, launch.limits)

    return estimate


def _scaled_hopper(launch):
    """The ring of both operands, the result in halves, and barriers."""
    block_n = launch["BLOCK_N"]
    return launch["NUM_STAGES"] * (128 + block_n) * launch["BLOCK_K"] + 128 * min(block_n, 128) + 512


def _weight_only(launch):
    """Codes, x and the scales of tiles on their way, the expanded weights; or the sums on their way to rows."""
    block_m, block_n, block_k = launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"]
    size = launch.bytes["x_ptr"]
    codes = block_n * block_k // (2 if launch.values["FORMAT"] == "int4" else 1)
    moving = launch.tiles * (codes + block_m * block_k * size + 8 * block_n)
    return max(moving + block_n * block_k * size, 4 * block_m * block_n) + SLACK


def _sparse(launch):
    tile = sparse.SparseConfig(launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"], 1, 4, launch.num_stages)
    return sparse.shared_bytes(tile, launch.bytes["a_ptr"])


_row = _tile("BLOCK_M", "BLOCK_N")
_ESTIMATES = {
    "_rms_norm_kernel": _row,
    "_rms_norm_quantized_kernel": _row,
    "_rms_norm_backward_kernel": _row,
    "_layer_norm_kernel": _row,
    "_layer_norm_backward_kernel": _row,
    "_gated_kernel": _row,
    "_gated_backward_kernel": _row,
    "_gated_quantized_kernel": _row,
    "_quantize_kernel": _row,
    "_largest_kernel": _row,
    "_quantize_2d_kernel": _tile("BLOCK_N", "BLOCK_N"),
    "_quantize_int4_kernel": _tile("BLOCK_G", "GROUP"),
    "_rotary_kernel": _tile("BLOCK_H", "BLOCK_HALF"),
    "_write_kv_cache_kernel": lambda launch: 4 * launch["BLOCK_M"] * max(
        2 * launch["BLOCK_HALF"], launch["BLOCK_REST"], launch["BLOCK_DV"]
    ) + SLACK,
    "_attention_kernel": _attention,
    "_attention_hopper_kernel": _attention_hopper,
    "_attention_dkdv_kernel": _backward("BLOCK_N", "BLOCK_M"),
    "_attention_dq_kernel": _backward("BLOCK_M", "BLOCK_N"),
    "_attention_delta_kernel": lambda launch: SLACK,
    "_merge_kernel": _tile("BLOCK_M", "BLOCK_DV"),
    "_paged_attention_kernel": _paged,
    "_scaled_matmul_kernel": _scaled("tile"),
    "_scaled_matmul_small_kernel": _scaled("small"),
    "_scaled_matmul_hopper_kernel": _scaled_hopper,
    "_scaled_matmul_combine_kernel": _tile("BLOCK_N"),
    "_weight_only_kernel": _weight_only,
    "_sparse_matmul_kernel": _sparse,
    "_sparse_matmul_combine_kernel": _tile("BLOCK_N"),
    # three kernels have this name: what a program joins of parts is a tile of them at most
    "_combine_kernel": lambda launch: (_tile("BLOCK_SPLITS", "BLOCK_DV") if "BLOCK_DV" in launch.values
                                       else _tile("BLOCK_N"))(launch),
}  # fmt: skip

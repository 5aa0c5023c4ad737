"""At most how many bytes of shared memory each kernel asks for, by the arithmetic of its tile; and CUDA launches.

`test_compile.py` compares it with what compiled examples really ask for, `test_defaults.py` with what devices have.
"""

import functools
import re
from dataclasses import dataclass

import torch

from fusedops._core.cuda import images
from fusedops._core.occupancy import MAX_BLOCK_THREADS, MAX_GRID
from fusedops.ops.attention import _triton as attention
from fusedops.ops.attention._triton import backward_launch, hopper_launch
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
    def estimate(launch):
        width, has_mask = launch["BLOCK_D"] + launch["BLOCK_DV"], launch.values["MASK_KIND"] != "none"
        sizes = launch[resident], launch[moving], launch.num_stages, width, launch.bytes["q_ptr"]
        return backward_launch.shared_bytes(*sizes, has_mask, launch.limits)

    return estimate


def _attention_hopper(launch):
    tile = hopper_launch.HopperConfig(
        launch["NUM_GROUPS"], launch["BLOCK_N"], launch["q_desc columns"], launch["v_desc columns"],
        launch["NUM_STAGES"], str(launch.values["OUT_IN_Q"]) == "True",
    )  # fmt: skip
    return hopper_launch.shared_bytes(tile, launch.bytes["q_desc"])


def _scaled(kernel):
    def estimate(launch):
        tile = scaled.MatmulConfig(
            kernel, launch["BLOCK_M"], launch["BLOCK_N"], launch["BLOCK_K"], 4, launch.num_stages
        )
        return scaled.shared_bytes(tile, launch.limits)

    return estimate


def _scaled_hopper(launch):
    tile = scaled.hopper_launch.HopperConfig(launch["BLOCK_N"], launch["NUM_STAGES"])
    return scaled.hopper_launch.shared_bytes(tile)


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


def too_much_of_cuda(launch, limits):
    """What of a CUDA kernel's launch a device does not have, one sentence each; registers are bounded in the source."""
    (x, y, z), found = launch.keywords["block"], []
    if not 1 <= x * y * z <= MAX_BLOCK_THREADS or x % 32:
        found.append(f"a block of {launch.keywords['block']}")
    if not all(1 <= size <= most for size, most in zip(launch.grid, MAX_GRID)):
        found.append(f"a grid of {launch.grid}")
    if launch.keywords["shared"] > limits.shared_memory:
        needed = launch.keywords["shared"]
        found.append(f"{needed} bytes of shared memory, there are {limits.shared_memory}")
    product = images.products(limits.arch)[-1]
    if launch.kernel.symbol not in symbols(product):
        found.append(f"no {launch.kernel.symbol} in {launch.kernel.source}.{product}")
    return found


@functools.cache
def symbols(product):
    """Names of the CUDA kernels that are compiled."""
    texts = [images.kept(source, product).content.decode() for source in images.names()]
    return {name for text in texts for name in re.findall(r"^\.visible \.entry (\w+)", text, re.MULTILINE)}

"""How many programs of a kernel a multiprocessor holds at once, by what each of its resources allows."""

from dataclasses import asdict, dataclass

from fusedops._core.device import KIB
from fusedops._core.numbers import ceil_div

WARP = 32  # threads
REGISTERS = 64 * 1024  # of a multiprocessor, and the most of one block
MAX_THREAD_REGISTERS = 255
MAX_BLOCK_THREADS = 1024
MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
REGISTER_UNIT = 256  # registers of a warp are given out in so many
PARTITIONS = 4  # of a multiprocessor; a warp's registers lie in one of them


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has.

    Attributes:
        threads: Resident threads.
        blocks: Resident blocks.
        shared: Bytes of shared memory for all blocks.
        reserved: Bytes of shared memory that each block takes beside its own.
        shared_unit: Shared memory is given out in so many bytes.
    """

    threads: int
    blocks: int
    shared: int
    reserved: int = KIB
    shared_unit: int = 128


# From the CUDA programming guide's table of technical specifications, by compute capability.
MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 * KIB, reserved=0, shared_unit=256),
    80: Multiprocessor(2048, 32, 164 * KIB),
    86: Multiprocessor(1536, 16, 100 * KIB),
    89: Multiprocessor(1536, 24, 100 * KIB),
    90: Multiprocessor(2048, 32, 228 * KIB),
    100: Multiprocessor(2048, 32, 228 * KIB),
    103: Multiprocessor(2048, 32, 228 * KIB),
    120: Multiprocessor(1536, 24, 100 * KIB),
}


@dataclass(frozen=True)
class Occupancy:
    """Programs and warps that a multiprocessor holds, and what limits them.

    Attributes:
        programs: Resident programs (blocks) of one multiprocessor.
        warps: Resident warps.
        share: Of all the warps that a multiprocessor may hold.
        limits: Each resource to how many programs it alone would allow.
    """

    programs: int
    warps: int
    share: float
    limits: dict

    @property
    def limited_by(self):
        """The resource of which there is least, the first in the order of `limits`."""
        return min(self.limits, key=self.limits.get)

    def as_dict(self):
        """The same as plain data, for JSON."""
        return {**asdict(self), "limited_by": self.limited_by}


def occupancy(capability, num_warps, registers, shared_bytes):
    """The occupancy of a kernel.

    Args:
        capability: Compute capability, 90 for ``"sm_90a"``.
        num_warps: Warps of a program.
        registers: Registers of a thread.
        shared_bytes: Shared memory of a program.

    Raises:
        ValueError: nothing is known of this compute capability.
    """
    if capability not in MULTIPROCESSORS:
        known = ", ".join(map(str, MULTIPROCESSORS))
        raise ValueError(f"occupancy: capability must be one of {known}, got {capability}")
    device = MULTIPROCESSORS[capability]
    warp_registers = _rounded(max(registers, 1) * WARP, REGISTER_UNIT)
    warps_of_partition = REGISTERS // PARTITIONS // warp_registers
    block_shared = _rounded(shared_bytes + device.reserved, device.shared_unit)
    max_warps = device.threads // WARP
    limits = {
        "registers": warps_of_partition * PARTITIONS // num_warps,
        "threads": max_warps // num_warps,
        "blocks": device.blocks,
    }
    if block_shared:
        limits["shared memory"] = device.shared // block_shared
    if warp_registers * _rounded(num_warps, PARTITIONS) > REGISTERS or registers > MAX_THREAD_REGISTERS:
        limits["registers"] = 0
    programs = min(limits.values())
    return Occupancy(programs, programs * num_warps, programs * num_warps / max_warps, limits)


def _rounded(value, unit):
    return ceil_div(value, unit) * unit

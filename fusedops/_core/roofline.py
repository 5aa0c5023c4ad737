"""The least time that a call takes on a device, and what will probably keep it from that: arithmetic alone."""

from dataclasses import asdict, dataclass

from fusedops._core import sass
from fusedops._core.device import TARGETS
from fusedops._core.numbers import ceil_div

# Seconds from a load to its value under load; no data sheet has it, measurements of these devices lie about it.
MEMORY_LATENCY = 600e-9
UNEVEN = 1.2  # from so many times the even share on, places that stay empty are what limits
# Data-sheet peaks in operations per second without sparsity; products of 16-bit numbers add up in float32.
PEAKS = {
    "Tesla T4": {"fp16": 65e12, "int8": 130e12, "fp32": 8.1e12},
    "A100 SXM 80GB": {"fp16": 312e12, "int8": 624e12, "fp32": 19.5e12},
    "GeForce RTX 3090": {"fp16": 71e12, "int8": 284e12, "fp32": 35.6e12},
    "L40S": {"fp16": 362e12, "fp8": 733e12, "int8": 733e12, "fp32": 91.6e12},
    "H100 SXM": {"fp16": 989e12, "fp8": 1979e12, "int8": 1979e12, "fp32": 66.9e12},
    "B200": {"fp16": 2250e12, "fp8": 4500e12, "int8": 4500e12, "fp32": 75e12},
    "GeForce RTX 5090": {"fp16": 209.5e12, "fp8": 419e12, "int8": 838e12, "fp32": 104.8e12},
}
_KINDS = {"H": "fp16", "I": "int8", "Q": "fp8"}  # first letter of a matrix instruction
_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Bound:
    """The least times of a call in seconds, and which of them is the longest.

    Attributes:
        memory: Bytes by the data sheet's bandwidth.
        arithmetic: Operations by the data sheet's peak of `kind`.
        kind: Numbers that the peak is of, told by the machine code: "fp8", "int8", "fp16", "tf32" or "fp32".
        latency: Bytes by what the loads under way can draw, `in_flight` bytes each MEMORY_LATENCY.
        in_flight, needed: Bytes that the resident programs have under way at most, and those that fill the bandwidth.
        rounds: Programs over places. The last round of programs leaves places empty.
        uneven: `arithmetic` with the places that stay empty.
        limiter: "memory", "tensor cores", "arithmetic", "latency" or
            "idle multiprocessors".
    """

    memory: float
    arithmetic: float
    kind: str
    latency: float
    in_flight: int
    needed: int
    rounds: float
    uneven: float
    limiter: str

    @property
    def seconds(self):
        """What memory and arithmetic alone need: the roofline."""
        return max(self.memory, self.arithmetic)

    def as_dict(self):
        """The same as plain data, for JSON."""
        return asdict(self) | {"seconds": self.seconds}


def rejection(device_limits):
    """Why nothing can be said of a device, or None."""
    if device_limits.bandwidth is None or _product(device_limits) not in PEAKS:
        return f"no data sheet of {device_limits.name} is known"
    return None


def _product(device_limits):
    known = TARGETS.get(device_limits.arch)
    return None if known is None else known.name


def kind_of(report):
    """The numbers that a kernel's main loop multiplies; of several the fastest, so that a bound stays one."""
    loop = sass.main_loop(report.loops)
    found = sass.matrix(loop["instructions"] if loop else report.instructions) or sass.matrix(report.instructions)
    kinds = {_kind(opcode) for opcode in found}
    return next((kind for kind in ("fp8", "int8", "fp16", "tf32") if kind in kinds), "fp32")


def _kind(opcode):
    return "tf32" if "TF32" in opcode else _KINDS.get(opcode.removeprefix("UTC")[0], "fp16")


def peak(device_limits, kind):
    """Operations per second of a device that `rejection` has no reason against; of tf32 half of those of fp16."""
    peaks = PEAKS[_product(device_limits)]
    return peaks["fp16"] / 2 if kind == "tf32" else peaks.get(kind, peaks["fp16"])


def bytes_in_flight(report, threads):
    """Bytes that one program has under way at most.

    Loads that go to shared memory (LDGSTS, UTMALDG) fill at most all of it. Others are under way together as far as
    one iteration of the main loop has them.
    """
    if sass.number(report.instructions, ("LDGSTS", "UTMALDG")):
        return report.shared_bytes
    loop = sass.main_loop(report.loops)
    counts = report.instructions if loop is None else loop["instructions"]
    return threads * sum(_width(opcode) * count for opcode, count in counts.items() if sass.base(opcode) == "LDG")


def _width(opcode):
    """Bytes that a thread loads by one instruction."""
    return next((size for name, size in _BYTES.items() if name in opcode.split(".")[1:]), 4)


def bound(device_limits, num_bytes, operations, report, programs, occupancy):
    """The least times of a call whose main kernel has this report.

    Args:
        device_limits: A device that `rejection` has no reason against.
        num_bytes, operations: What the call moves and computes at least.
        report: CubinReport of the kernel that does most.
        programs: How many programs of it are launched.
        occupancy: Of that kernel.
    """
    kind = kind_of(report)
    memory = num_bytes / device_limits.bandwidth
    arithmetic = operations / peak(device_limits, kind)
    places = max(occupancy.programs, 1) * device_limits.sm_count
    rounds = programs / places
    resident = min(programs, places)
    in_flight = resident * bytes_in_flight(report, report.num_warps * 32)
    latency = num_bytes * MEMORY_LATENCY / in_flight if in_flight else 0.0
    # Programs on one multiprocessor share its units: in a single round only multiprocessors without any are lost.
    busy = min(programs, device_limits.sm_count) / device_limits.sm_count
    filled = programs / (ceil_div(programs, places) * places) if programs > places else busy
    uneven = arithmetic / filled
    times = {
        "memory": memory, "tensor cores" if kind != "fp32" else "arithmetic": arithmetic, "latency": latency,
    }  # fmt: skip
    if uneven > UNEVEN * arithmetic:  # else the last round costs too little to name it
        times["idle multiprocessors"] = uneven
    limiter = max(times, key=times.get)  # of equals the first: memory, then arithmetic
    needed = round(device_limits.bandwidth * MEMORY_LATENCY)
    return Bound(memory, arithmetic, kind, latency, in_flight, needed, rounds, uneven, limiter)

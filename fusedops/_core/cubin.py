"""Compile a Triton kernel for any GPU without having one, and read what machine code says, of any compiler.

Triton's package brings ptxas, cuobjdump and nvdisasm; neither a driver nor a CUDA toolkit is needed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from fusedops._core import env, fingerprint, sass
from fusedops._core.files import write_whole

_WIDE = ("128", "256")  # modifiers of 16-byte and 32-byte accesses
_EM_CUDA = 190  # e_machine
_NEW_ABI = 8  # of CUDA 13; e_flags has the capability in its lowest byte before, in the second one since
_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+)")


@dataclass(frozen=True)
class CubinReport:
    """What the machine code of one kernel needs and contains.

    Attributes:
        kernel: The kernel's name.
        target: The architecture that Triton really compiled for, such as ``"sm_90a"``.
        num_warps: Warps of a block.
        registers: Registers of a thread.
        stack_bytes: Stack frame of a thread.
        shared_bytes: Shared memory that a launch asks for; Triton uses no static one.
        spill_stores, spill_loads: Number of STL and LDL instructions.
        spill_in_loop: Whether one of them lies on a cycle of the control flow.
        instructions: Opcode with its modifiers to how often it stands in the code.
        loops: The loops that do the work: how deep each stands, and its instructions, as above.
    """

    kernel: str
    target: str
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    spill_stores: int
    spill_loads: int
    spill_in_loop: bool
    instructions: dict
    loops: list

    def count(self, opcode, *modifiers):
        """How many instructions have this opcode and any one of the modifiers (none given: all of the opcode)."""
        total = 0
        for name, number in self.instructions.items():
            base, *found = name.split(".")
            if base == opcode and (not modifiers or set(modifiers) & set(found)):
                total += number
        return total

    @property
    def wide_loads(self):
        """Global loads of at least 16 bytes a thread, tensor-memory (TMA) loads included."""
        return self.count("LDG", *_WIDE) + self.count("LDGSTS", *_WIDE) + self.count("UTMALDG")

    @property
    def wide_stores(self):
        """Global stores of at least 16 bytes a thread, tensor-memory (TMA) stores included."""
        return self.count("STG", *_WIDE) + self.count("UTMASTG")

    def as_dict(self):
        """The report as plain dicts and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The report that `as_dict` described."""
        return cls(**values)


def report(example, target):
    """Compile a KernelExample for a target and read its machine code.

    Args:
        example: What to compile.
        target: ``"sm_75"`` to ``"sm_120"``; the suffix may be left out, since Triton chooses it (sm_90 becomes sm_90a).

    Returns:
        The CubinReport.

    Raises:
        ValueError: the target's name has another form, or a parameter of the kernel is not described.
        RuntimeError: triton was imported with TRITON_INTERPRET=1, or one of its tools failed.
    """
    return read(compile_example(example, target))


def read(compiled):
    """Read the machine code of a compiled kernel."""
    return read_all([compiled])[0]


def read_all(kernels):
    """Read the machine code of compiled kernels, in little more time than that of one."""
    codes = [(_arch(compiled), _machine_code(compiled.asm["cubin"])) for compiled in kernels]
    listed = {}
    for arch in dict.fromkeys(arch for arch, _ in codes):
        indices = [index for index, (of, _) in enumerate(codes) if of == arch]
        listed |= zip(indices, _listed(arch, [codes[index][1] for index in indices]))
    return [_report(compiled, arch, listed[index]) for index, (compiled, (arch, _)) in enumerate(zip(kernels, codes))]


def kept(key, make):
    """The CubinReport that `make()` gives, from the cache directory where it was made under this key before."""
    path = env.cache_dir() / "inspect" / f"{key}-{_readers()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # whatever cannot be read is made again
        return CubinReport.from_dict(json.loads(path.read_text()))
    found = make()
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the next process a compilation
        write_whole(path, json.dumps(found.as_dict()))
    return found


@functools.cache
def _readers():
    """A hash of the code that makes a report of machine code."""
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in (__file__, sass.__file__))).hexdigest()[:16]


def read_kernel(content, name, arch, num_warps, shared_bytes):
    """Read the machine code of one kernel of a cubin that may hold several, with what its launch says of it."""
    (listed,) = _listed(arch, [_machine_code(content, name)])
    return _described(content, name, arch, num_warps, shared_bytes, listed)


def _report(compiled, arch, listed):
    metadata = compiled.metadata
    return _described(compiled.asm["cubin"], metadata.name, arch, metadata.num_warps, metadata.shared, listed)


def _described(content, name, arch, num_warps, shared_bytes, listed):
    """What is listed, with what cuobjdump says of the kernel's resources."""
    with _file(content) as path:
        usage = _USAGE.search(_run_tool("cuobjdump", "-res-usage", path).split(f"Function {name}:")[-1])
    if usage is None:
        raise RuntimeError(f"cubin: cuobjdump did not report the resources of {name}")
    registers, stack_bytes = int(usage["registers"]), int(usage["stack"])
    return CubinReport(name, arch, num_warps, registers, stack_bytes, shared_bytes, **listed)


def _listed(arch, codes):
    """What `sass.parse_all` finds in machine code of one architecture."""
    with _file(b"".join(codes)) as path:
        # -ndf: the analysis left out, a fifth of the time, only annotates indirect branches.
        text = _run_tool("nvdisasm", "-ndf", "-b", arch.replace("sm_", "SM"), path)
    return sass.parse_all(text, [len(code) for code in codes])


def _arch(compiled):
    return re.search(r"^\.target\s+(\w+)", compiled.asm["ptx"], re.MULTILINE)[1]


def _machine_code(cubin, kernel=""):
    """The instructions of a kernel of a cubin, an ELF file: of one with a single kernel the only .text section."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + index * size) for index in range(number)]
    wanted = f".text.{kernel}".encode() + b"\0" * bool(kernel)
    texts = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(wanted, headers[names][4] + name)
    ]
    if len(texts) != 1:
        raise RuntimeError(f"cubin: machine code must be that of one kernel{kernel and f' {kernel}'}, got {len(texts)}")
    return texts[0]


def capability(content):
    """The compute capability that machine code is for, 90 of sm_90a, from its ELF header.

    ValueError: it is not a cubin.
    """
    if len(content) < 64 or content[:4] != b"\x7fELF" or struct.unpack_from("<H", content, 18)[0] != _EM_CUDA:
        raise ValueError("cubin: machine code must be an ELF file for CUDA")
    (flags,) = struct.unpack_from("<I", content, 48)
    return (flags >> 8 if content[8] >= _NEW_ABI else flags) & 0xFF


@contextlib.contextmanager
def _file(content):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel")
        with open(path, "wb") as file:
            file.write(content)
        yield path


def compile_example(example, target):
    """Compile a KernelExample; the result's ``asm`` holds every stage from ``ttir`` to ``cubin``."""
    matched = re.fullmatch(r"sm_(\d{2,3})[af]?", target)
    if matched is None:
        raise ValueError(f"cubin: target must look like 'sm_90a', got {target!r}")
    function = example.kernel
    _check_compiles(function)
    names = function.arg_names
    unknown = set(names) ^ (set(example.types) | set(example.constants))
    if unknown:
        raise ValueError(f"cubin: types and constants must describe {function.__name__}, differ in {sorted(unknown)}")
    signature = {name: "constexpr" if name in example.constants else example.types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in example.divisible}
    options = {"num_warps": example.num_warps, "num_stages": example.num_stages}
    if example.max_registers is not None:
        options["maxnreg"] = example.max_registers
    return _compile(function, signature, dict(example.constants), attributes, int(matched[1]), options)


def compile_bound(binding):
    """Compile a Binding as its launch would; the result is that of `compile_example`."""
    _check_compiles(binding.function)
    return _compile(
        binding.function, binding.signature, binding.constants, binding.attributes, binding.capability,
        dict(vars(binding.options)),
    )  # fmt: skip


def _compile(function, signature, constants, attributes, capability, options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fingerprint.settle(function)
    kind = ASTSource
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    source = kind(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _check_compiles(function):
    import triton

    if triton.knobs.runtime.interpret or not isinstance(function, triton.runtime.jit.JITFunction):
        raise RuntimeError("cubin: kernels compile only in a process that imported triton without TRITON_INTERPRET=1")


def assemble_for(compiled, target):
    """Assemble a compiled kernel's PTX for a target whose PTX is the same but for its name, as sm_80's and sm_89's.

    Returns:
        What `read` takes.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    capability = int(target.removeprefix("sm_"))
    ptx = re.sub(r"^\.target\s+\w+", f".target {target}", compiled.asm["ptx"], flags=re.MULTILINE)
    backend = make_backend(GPUTarget("cuda", capability, 32))
    machine_code = backend.make_cubin(ptx, {}, compiled.metadata, capability)
    return SimpleNamespace(asm={"ptx": ptx, "cubin": machine_code}, metadata=compiled.metadata)


def assemble(ptx, kernel, arch):
    """A cubin of one kernel of a PTX file, by `assembler()`. RuntimeError: its own words."""
    with _file(ptx) as path:
        _run_tool(_newest_ptxas(), f"--gpu-name={arch}", "--entry", kernel, path, "-o", f"{path}.cubin")
        return Path(f"{path}.cubin").read_bytes()


@functools.cache
def assembler():
    """The newest ptxas that Triton brings, in words: it reads the newest PTX."""
    release = re.search(r"release ([\d.]+)", _run_tool(_newest_ptxas(), "--version"))
    return f"ptxas {release[1] if release else ''}".strip()


def _newest_ptxas():
    return "ptxas-blackwell" if os.path.exists(_tool("ptxas-blackwell")) else "ptxas"


def _tool(name):
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _run_tool(name, *arguments):
    path = _tool(name)
    try:
        ended = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"cubin: {name} of the triton package cannot be started: {error}") from error
    if ended.returncode != 0:
        raise RuntimeError(f"cubin: {name} failed: {ended.stderr.strip() or ended.stdout.strip()}")
    return ended.stdout

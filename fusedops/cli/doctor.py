"""Say what of fusedops works on this machine and what does not; exit status 1 where something is broken."""

import ctypes
import importlib
import json
import os
import platform
import shutil
import stat
import sys
from dataclasses import asdict, dataclass

from fusedops._core import env
from fusedops.cli.console import Console, first_line

OK, ABSENT, BROKEN = "ok", "absent", "BROKEN"
OLDEST = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 0)}
CUDA_ERROR_NO_DEVICE = 100
SELF_CHECK_SHAPE = (1, 3, 2, 64)  # fits every operator, rotary too


@dataclass(frozen=True)
class Check:
    """One finding: `status` is OK, ABSENT (fine, but something will not be used) or BROKEN."""

    name: str
    status: str
    detail: str


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args):
    """Run the command."""
    checks = [
        Check("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *(_version(name) for name in OLDEST),
        _driver(),
        *_gpus(),
        _compiler(),
        *_cuda_kernels(),
        _emulator(),
        *_variables(),
        _cache(),
        *_operators(),
    ]
    broken = [check.name for check in checks if check.status == BROKEN]
    if args.json:
        print(json.dumps({"broken": broken, "checks": [asdict(check) for check in checks]}, indent=2))
        return int(bool(broken))
    width = max(len(check.name) for check in checks)
    console = Console()
    for check in checks:
        console.line(f"{check.name:<{width}}  {check.status:<6}  {check.detail}")
    console.line(f"\nBroken: {', '.join(broken)}" if broken else "\nNothing is broken.")
    return int(bool(broken))


def _version(name):
    """A package, its version, and whether that is new enough."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            return Check(name, BROKEN, f"cannot be imported: {first_line(error)}")
        return Check(name, ABSENT, "not installed")
    except Exception as error:  # a broken install fails in many ways
        return Check(name, BROKEN, f"cannot be imported: {first_line(error)}")
    found = tuple(int(part) for part in module.__version__.split(".")[:2])
    if found < OLDEST[name]:
        return Check(name, BROKEN, f"{module.__version__}, needs {'.'.join(map(str, OLDEST[name]))} or newer")
    return Check(name, OK, module.__version__)


def _driver():
    """The CUDA driver, asked without creating a context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check("cuda driver", ABSENT, "no libcuda.so.1")
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    text = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    status = driver.cuInit(0)
    if status == CUDA_ERROR_NO_DEVICE:
        return Check("cuda driver", ABSENT, f"{text}, but no device")
    if status:
        return Check("cuda driver", BROKEN, f"{text}, but cuInit fails with error {status}")
    return Check("cuda driver", OK, text)


def _gpus():
    """Every GPU with its limits and whether fused kernels run on it."""
    import torch

    from fusedops._core import device as devices

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return [Check("gpu", ABSENT, f"torch finds none (it is {built})")]
    checks = []
    for index in range(torch.cuda.device_count()):
        place = torch.device("cuda", index)
        limits = devices.limits(place)
        reason = devices.triton_rejection(place)
        detail = (
            f"{limits.name}, {limits.arch}, {limits.sm_count} multiprocessors, "
            f"{limits.shared_memory // 1024} KiB of shared memory a block, {limits.l2 // 2**20} MiB of L2"
        )
        checks.append(Check(f"gpu {index}", ABSENT if reason else OK, f"{detail}; {reason}" if reason else detail))
    return checks


def _compiler():
    """Triton compiles a launcher in C at the first use of each kernel."""
    import torch

    found = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "clang", "cc"))), None)
    if found:
        return Check("c compiler", OK, found)
    return Check(
        "c compiler", BROKEN if torch.cuda.is_available() else ABSENT, "Triton needs gcc or clang to launch kernels"
    )


def _cuda_kernels():
    """What was shipped of the CUDA kernels, what would compile the rest, and what would launch them."""
    from fusedops._core.cuda import driver, images, toolchain

    compiler = toolchain.found()
    checks = [_cuda_source(name, compiler) for name in images.names()]
    if compiler:
        checks.append(Check("cuda compiler", OK, f"{compiler}, for machine code that was not shipped"))
    else:
        checks.append(Check("cuda compiler", ABSENT, "neither nvcc nor NVRTC (pip install nvidia-cuda-nvrtc)"))
    try:
        driver.library()
    except RuntimeError as error:
        return [*checks, Check("cuda launcher", ABSENT, first_line(error))]
    return [*checks, Check("cuda launcher", OK, f"the driver's C interface in {driver.LIBRARY}")]


def _cuda_source(name, compiler):
    """What there is of one source: machine code and PTX that are made from it as it is."""
    import torch

    from fusedops._core import device as devices
    from fusedops._core.cuda import images

    found = [image for image in (images.kept(name, product) for product in images.PRODUCTS) if image is not None]
    parts = [f"{image.product} {image.origin}" for image in found]
    missing = [product for product in images.PRODUCTS if product not in {image.product for image in found}]
    if missing:
        parts.append(f"{', '.join(missing)} {'compiled at first use' if compiler else 'cannot be made here'}")
    status = OK if found else ABSENT
    if torch.cuda.is_available() and not compiler:
        arch = devices.limits(torch.device("cuda", 0)).arch
        if images.ready(name, arch) is None:
            status, parts = BROKEN, [*parts, f"nothing can be loaded on {arch}"]
    return Check(f"{name}.cu", status, "; ".join(parts))


def _emulator():
    """Whether compiled kernels can be run on the CPU here."""
    import torch

    from fusedops._core import emulation
    from fusedops.testing.ptx import build

    reason = emulation.rejection(torch.device("cpu"))
    if reason is not None:
        return Check("emulator", ABSENT, reason)
    return Check("emulator", OK, f"compiled with {build.compiler()} at first use")


def _variables():
    """Every variable of ours that is set, and whether it means something."""
    checks = []
    for name in sorted({*env.VARIABLES, *(name for name in os.environ if name.startswith("FUSEDOPS_"))}):
        if name not in os.environ:
            continue
        if name not in env.VARIABLES:
            checks.append(Check(name, BROKEN, f"no such variable; there are {', '.join(env.VARIABLES)}"))
            continue
        try:
            checks.append(Check(name, OK, env.read(name)))
        except ValueError as error:
            checks.append(Check(name, BROKEN, first_line(error)))
    return checks or [Check("environment", OK, "no FUSEDOPS_ variable is set")]


def _cache():
    """The cache directory: ours alone to write, because code is loaded from it."""
    folder = env.cache_dir()
    if not folder.exists():
        above = next(parent for parent in folder.parents if parent.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            return Check("cache", BROKEN, f"{folder} cannot be made: {above} is not a directory that can be written")
        return Check("cache", ABSENT, f"{folder} is made at first use")
    if not folder.is_dir():
        return Check("cache", BROKEN, f"{folder} is not a directory")
    status = folder.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return Check("cache", BROKEN, f"{folder} belongs to user {status.st_uid}, not to {os.getuid()}")
    if sys.platform != "win32" and status.st_mode & stat.S_IWOTH:
        return Check("cache", BROKEN, f"{folder} can be written by everyone: chmod o-w")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Check("cache", BROKEN, f"{folder} cannot be written")
    return Check("cache", OK, str(folder))


def _operators():
    """Every public operator: what runs it here, and whether that agrees with the reference on a small input."""
    import torch

    import fusedops

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [_operator(name, place) for name in fusedops.OPERATORS]


def _operator(name, place):
    import torch

    import fusedops
    from fusedops._core.device import triton_rejection
    from fusedops.cli.explain import example_call

    try:
        positional, named = example_call(name, SELF_CHECK_SHAPE, torch.float32, place)
        explanation = fusedops.explain(name, *positional, **named)
        difference = _difference(name, positional, named)
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(name, BROKEN, first_line(error))
    if difference:
        return Check(name, BROKEN, f"{explanation.backend} disagrees with the reference: {difference}")
    if explanation.backend in ("triton", "cuda"):
        return Check(name, OK, f"fused, {explanation.backend}")
    if explanation.backend == "emulate":
        return Check(name, OK, f"fused, compiled for {env.emulate_target()} and emulated")
    reasons = [f"{implementation}: {reason}" for implementation, reason in explanation.rejected]
    why = "; ".join(reasons) or triton_rejection(place) or "chosen for this call"
    return Check(name, OK, f"not fused, {explanation.backend} ({why})")


def _difference(name, positional, named):
    """How a small float32 call differs from the reference implementation, in one line; None where it agrees."""
    import torch

    import fusedops

    results = []
    for backend in (env.backend(), "reference"):
        arguments = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in positional]
        with env.override("FUSEDOPS_BACKEND", backend):
            outputs = getattr(fusedops, name)(*arguments, **named)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append([_comparable(value) for value in (*outputs, *arguments) if isinstance(value, torch.Tensor)])
    try:
        for found, wanted in zip(*results, strict=True):
            one_code = found.dtype == torch.int8  # what is quantised may lie at the middle of two codes
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1 if one_code else 1e-5)
    except AssertionError as error:
        return first_line(error)
    return None


def _comparable(tensor):
    """Float8 widened: torch compares its bits alone."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor

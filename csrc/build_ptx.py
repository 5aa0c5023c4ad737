"""Compiles the kernels of ``cuda/`` to PTX: ``python csrc/build_ptx.py``, with the nvcc of ``tests/ptx/cuda/build.py``.

The PTX is committed and shipped: the emulator runs it where there is no compiler, and a GPU's driver compiles it. Its
first line has the fingerprint of the source; what is made from another source is not used.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fusedops._core.cuda import toolchain  # noqa: E402 - found by the line above
from tests.ptx.cuda.build import NVCC_RELEASE, nvcc, tidied  # noqa: E402

SOURCES = ROOT / "csrc" / "cuda"
PRODUCTS = ("sm_80.ptx", "sm_90a.ptx")


def outputs():
    """(source, product) of every file that must be there."""
    return [(source, product) for source in sorted(SOURCES.glob("*.cu")) for product in PRODUCTS]


def path_of(source, product):
    """Where PTX is committed."""
    return SOURCES / "ptx" / f"{source.stem}.{product}"


def text_of(source, product):
    """The whole file, made anew."""
    made = tidied(toolchain.compile_source(source, product).decode())
    return f"// made by build_ptx.py from {toolchain.fingerprint(source)}\n{made}"


def main():
    """Write every file."""
    if nvcc() is None:
        sys.exit(f"build_ptx.py: needs nvcc of CUDA {NVCC_RELEASE} on the PATH")
    (SOURCES / "ptx").mkdir(exist_ok=True)
    for source, product in outputs():
        path_of(source, product).write_text(text_of(source, product))
        print(path_of(source, product).name)


if __name__ == "__main__":
    main()

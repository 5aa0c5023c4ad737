"""Compile csrc/cuda as an installation would, into a folder; exit status 77 where there is no compiler.

python benchmarks/build_kernels.py DIR
"""

import sys
from pathlib import Path

from _rows import NOT_RUN, ROOT


def main(folder):
    """Compile into a folder and say with what."""
    sys.path.insert(0, str(ROOT))
    try:
        from setup import compile_kernels
    except ImportError as error:
        print(f"needs {error.name}")
        return NOT_RUN
    print(compile_kernels(folder))
    return 0 if any(folder.glob("*.cubin")) else NOT_RUN


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

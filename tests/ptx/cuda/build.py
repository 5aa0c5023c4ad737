"""Compiles the kernels of this folder to PTX: ``python tests/ptx/cuda/build.py``, with nvcc 13.0.

The PTX is committed, so tests need no CUDA toolkit. Its first line has a hash of what it was made from.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER.parents[2] / "csrc" / "cuda"
HEADERS = [FOLDER / "kernels.cuh", *(LIBRARY / f"{name}.cuh" for name in ("common", "ptx", "wgmma"))]
NVCC_RELEASE = "13.0"
TARGETS = {  # source to the targets that it is compiled for
    "blocks": ["sm_80"],
    "bulk": ["sm_90a"],
    "cluster": ["sm_90a"],
    "gemm_mma": ["sm_80", "sm_89"],
    "gemm_registers_wgmma": ["sm_90a"],
    "gemm_sparse_mma": ["sm_80"],
    "gemm_sparse_wgmma": ["sm_90a"],
    "gemm_wgmma": ["sm_90a"],
    "tensor_map": ["sm_90a"],
    "warp": ["sm_80"],
}
OUTPUTS = [(source, target) for source, targets in TARGETS.items() for target in targets]


def ptx_path(source, target):
    return FOLDER / f"{source}.{target}.ptx"


def fingerprint(source):
    """Of a source and the headers."""
    digest = hashlib.sha256()
    for path in (FOLDER / f"{source}.cu", *HEADERS):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def nvcc():
    """The compiler's path, or None where there is none of the release that the committed PTX was made with."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return path if f"release {NVCC_RELEASE}," in version else None


def compiled(source, target):
    """PTX as nvcc writes it."""
    code = target.removeprefix("sm_")
    command = [nvcc(), "-ptx", "-std=c++17", "-O3", "-lineinfo", f"-gencode=arch=compute_{code},code=compute_{code}"]
    done = subprocess.run([*command, f"{source}.cu", "-o", "-"], cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source}.cu: nvcc said\n{done.stderr}")
    return done.stdout


def tidied(ptx):
    """Without comments, debug text and the paths of this machine.

    Places inside the headers go too: they are one-instruction functions, and a report is to name who called them.
    """
    ptx = ptx.split("\t.section\t.debug_str")[0].replace("\t", " ")
    # In the names of what stands in an anonymous namespace, nvcc puts hashes of where the source was.
    ptx = re.sub(r"(_GLOBAL__N__)[0-9a-f]{8}(_\d+_\w+?_cu_)[0-9a-f]{8}", r"\g<1>00000000\g<2>00000000", ptx)
    ptx = re.sub(r'^(\s*\.file\s+\d+ ").*/([^"/]+)".*$', r'\1\2"', ptx, flags=re.MULTILINE)
    files = dict(re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx))
    inside = {number for number, name in files.items() if not name.endswith(".cu")}
    lines = []
    for line in ptx.splitlines():
        line = line.split("//")[0].strip()
        location = re.match(r"\.loc\s+(\d+) (\d+)", line)
        if location and location[1] in inside or not line:
            continue
        if location:
            line = f".loc {location[1]} {location[2]} 0"
            if lines[-1].startswith(".loc"):
                lines.pop()
        if line.startswith(".file") and line.split()[1] in inside:
            continue
        lines.append(line if line.endswith(":") or line.startswith((".", "{", "}", ")")) else f"  {line}")
    return "\n".join(lines) + "\n"


def main():
    if nvcc() is None:
        sys.exit(f"build.py: needs nvcc of CUDA {NVCC_RELEASE} on the PATH")
    for source, target in OUTPUTS:
        text = f"// made from {fingerprint(source)} by build.py\n{tidied(compiled(source, target))}"
        ptx_path(source, target).write_text(text)
        print(ptx_path(source, target).name)


if __name__ == "__main__":
    main()

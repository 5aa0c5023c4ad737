"""Every Triton kernel of every operator to machine code, for GPUs that nobody needs to have.

Results are kept in pytest's cache under a hash of the sources, so only what changed compiles again.
"""

import ast
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from fusedops._core.cubin import CubinReport
from fusedops._core.device import TARGETS
from fusedops._core.occupancy import occupancy
from tests.shared_memory import from_row, shared_memory

ROOT = Path(__file__).resolve().parents[1]
WORKER = "tests.data.compile_worker"
GATED_TARGETS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
DTYPES = ("fp16", "bf16", "fp32")
EVERYTHING = tuple(itertools.product(GATED_TARGETS, DTYPES))
# Left to the deep run, as what another pair of the same kernels shows:
# float16 but on one target: its code is bfloat16's with other conversions, same tiles, shared memory and, give or take
# two, registers; float32 on sm_100a: no matrix unit takes part, tiles and limits are sm_90a's.
FEW_TARGETS = ("sm_80", "sm_90a")
LEFT_OUT = {*((target, "fp16") for target in GATED_TARGETS if target != "sm_90a"), ("sm_100a", "fp32")}
GATED = tuple(pair for pair in EVERYTHING if pair not in LEFT_OUT)
MAX_STACK_BYTES = 64
OPERATOR_FILES = sorted([*ROOT.glob("fusedops/ops/*/_triton.py"), *ROOT.glob("fusedops/ops/*/_triton/__init__.py")])
PLANTED = ROOT / "tests/data/planted_triton.py"

pytestmark = pytest.mark.compile


def module_name(path):
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_files(path):
    """The file and every file of fusedops that it imports, directly or not."""
    pending, found = [path], set()
    if path.name == "__init__.py":
        pending += path.parent.glob("*.py")
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        for node in ast.walk(ast.parse(current.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                if name.startswith("fusedops."):
                    base = ROOT / name.replace(".", "/")
                    pending += [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()]
    return sorted(found)


def cache_key(path, combinations):
    """Changes with the sources of the kernels, of their compilation and of the examples, and with triton."""
    digest = hashlib.sha256(f"{importlib.metadata.version('triton')} {combinations}".encode())
    tools = imported_files(ROOT / "tests/data/compile_worker.py")
    for file in [*imported_files(path), *tools]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def compiled_rows(path, cache_folder, scratch, combinations=GATED):
    """The worker's rows for one Triton file, from the cache where nothing changed."""
    stored = Path(cache_folder) / f"{module_name(path)}-{cache_key(path, combinations)}.json"
    with FileLock(stored.with_suffix(".lock")):  # of several test processes one compiles, the others wait
        if not stored.exists():
            partial = stored.with_suffix(f".{os.getpid()}")
            partial.write_text(_compile(path, scratch, combinations))
            partial.replace(stored)
    return json.loads(stored.read_text())


def _compile(path, scratch, combinations):
    """What the worker prints about one Triton file."""
    return _worker(scratch, module_name(path), *map("/".join, combinations))


def _worker(scratch, *arguments):
    """What the worker prints: a process without the interpreter, and with empty caches of Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(scratch)
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth of the time; the instructions are the same
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", WORKER, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, f"the compile worker failed on {arguments}:\n{ended.stderr[-3000:]}"
    return ended.stdout


def kernels_defined(path):
    """Names of the @triton.jit functions that are kernels, which end in _kernel."""
    files = [path] if path.name != "__init__.py" else path.parent.glob("*.py")
    trees = [ast.parse(file.read_text()) for file in files]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    jitted = [function for function in functions if any("jit" in ast.unparse(mark) for mark in function.decorator_list)]
    return {function.name for function in jitted if function.name.endswith("_kernel")}


def broken_gates(row):
    """What one compiled example violates of the static gates."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    report, target = CubinReport.from_dict(row["report"]), TARGETS[row["target"]]
    broken = []
    if report.target != target.arch:
        broken.append(f"was compiled for {report.target}")
    if report.shared_bytes > target.shared_memory:
        broken.append(f"needs {report.shared_bytes} bytes of shared memory, {target.name} has {target.shared_memory}")
    held = occupancy(target.capability, report.num_warps, report.registers, report.shared_bytes)
    if not held.programs:
        broken.append(f"fits no multiprocessor of {target.name}: {held.limits}")
    if report.stack_bytes > MAX_STACK_BYTES:
        broken.append(f"has a stack frame of {report.stack_bytes} bytes, at most {MAX_STACK_BYTES} are allowed")
    if report.spill_in_loop:
        broken.append(f"spills in a loop ({report.spill_stores} STL, {report.spill_loads} LDL in all)")
    if row["wide_access"] and row["target"] in FEW_TARGETS:
        broken += [] if report.wide_loads else ["has no LDG.E.128"]
        broken += [] if report.wide_stores else ["has no STG.E.128"]
    return broken


def beyond_estimates(rows):
    """Where an operator's arithmetic of shared memory says less than a kernel needs: its defaults rest on that."""
    found = []
    for row in rows:
        if "report" not in row:
            continue
        needed, estimate = row["report"]["shared_bytes"], shared_memory(from_row(row, TARGETS[row["target"]]))
        if needed > estimate:
            found.append(f"{describe(row)}: needs {needed} bytes of shared memory, estimated are at most {estimate}")
    return found


def describe(row):
    """The example in words."""
    constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
    return f"{row['kernel']} {row['dtype']} {row['target']} {constants}"


def violations(path, rows):
    """Everything that is wrong with a Triton file, one sentence each."""
    found = [f"{describe(row)}: {what}" for row in rows for what in broken_gates(row)]
    missing = kernels_defined(path) - {row["kernel"] for row in rows}
    return found + [f"{name}: has no example" for name in sorted(missing)]


EVERY_OPERATOR = pytest.mark.parametrize(
    "path", OPERATOR_FILES, ids=lambda path: path.relative_to(ROOT / "fusedops/ops").parts[0]
)


@pytest.fixture
def cache_folder(request):
    return request.config.cache.mkdir("fusedops_compile")


@pytest.mark.parametrize("combinations", [
    pytest.param(GATED, id="usual"), pytest.param(EVERYTHING, id="everything", marks=pytest.mark.deep),
])  # fmt: skip
@EVERY_OPERATOR
def test_operator_compiles_within_the_static_gates(path, combinations, cache_folder, tmp_path):
    rows = compiled_rows(path, cache_folder, tmp_path, combinations)
    assert {(row["target"], row["dtype"]) for row in rows} == set(combinations)
    found = violations(path, rows) + beyond_estimates(rows)
    assert not found, f"{len(found)} violations in {len(rows)} examples:\n" + "\n".join(found)


def same_ptx(path, scratch, *dtypes):
    """How many examples have one PTX for the two targets that share it; all must."""
    found = json.loads(_worker(scratch, "--same-ptx", module_name(path), *dtypes))
    assert not found["different"]
    return found["compared"]


@pytest.mark.deep
@EVERY_OPERATOR
def test_targets_that_share_ptx(path, tmp_path):
    assert same_ptx(path, tmp_path, *DTYPES)


def test_operators_are_found():
    assert len(OPERATOR_FILES) >= 4


@pytest.fixture
def planted_rows(cache_folder, tmp_path):
    return compiled_rows(PLANTED, cache_folder, tmp_path, [(t, "bf16") for t in ("sm_80", "sm_89", "sm_90a")])


def test_planted_faults_are_found(planted_rows):
    found = violations(PLANTED, planted_rows)
    assert any("_spilling_kernel bf16 sm_89" in line and "spills in a loop" in line for line in found)
    for target in FEW_TARGETS:
        of_target = [sentence for sentence in found if f" {target} " in sentence]
        expected = {
            "_scalar_access_kernel": ("has no LDG.E.128", "has no STG.E.128"),
            "_spilling_kernel": ("spills in a loop", "has a stack frame"),
            "_broken_kernel": ("does not compile",),
        }
        for kernel, sentences in expected.items():
            for sentence in sentences:
                assert any(kernel in line and sentence in line for line in of_target), (kernel, sentence, found)
        assert len(of_target) == 5
    assert "_forgotten_kernel: has no example" in found
    assert not any("_good_kernel" in line for line in found)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shared_bytes": 300 * 1024}, "bytes of shared memory"),
        ({"stack_bytes": 72}, "stack frame of 72 bytes"),
        ({"target": "sm_80"}, "compiled for sm_80"),
        ({"spill_in_loop": True}, "spills in a loop"),
        ({"registers": 256}, "fits no multiprocessor of H100 SXM"),
    ],
)
def test_each_limit_can_fail(planted_rows, change, sentence):
    good = next(row for row in planted_rows if row["kernel"] == "_good_kernel" and row["target"] == "sm_90a")
    assert broken_gates(good) == []
    altered = dataclasses.replace(CubinReport.from_dict(good["report"]), **change).as_dict()
    assert any(sentence in line for line in broken_gates({**good, "report": altered}))


@pytest.mark.parametrize(("shared_bytes", "number"), [(18432, 0), (18433, 1)])
def test_an_estimate_that_says_too_little_is_found(planted_rows, shared_bytes, number):
    row = next(row for row in planted_rows if row["kernel"] == "_good_kernel")
    tile = {"kernel": "_rms_norm_kernel", "constants": {"BLOCK_M": "4", "BLOCK_N": "1024"}}  # 16 KiB, and 2 beside it
    altered = {**row, **tile, "report": {**row["report"], "shared_bytes": shared_bytes}}
    assert len(beyond_estimates([altered])) == number


def test_cache_key_follows_the_sources():
    path = OPERATOR_FILES[0]
    files = imported_files(path)
    assert {ROOT / "fusedops/_core/tl.py", ROOT / "fusedops/_core/launch.py", path} <= set(files)
    assert cache_key(path, GATED) == cache_key(path, GATED)
    assert len({cache_key(path, combinations) for combinations in (GATED, GATED[:1])}) == 2
    assert len({cache_key(file, GATED) for file in (path, PLANTED)}) == 2

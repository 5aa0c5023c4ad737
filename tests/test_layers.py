"""Who may import whom, sizes and forbidden constructs, read from the source; and what ``import fusedops`` loads.

A rule is a function of one file that yields what is wrong. Each has a planted violation that it must find.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("fusedops/**/*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_KERNEL_LINES, MAX_COLUMNS = 400, 60, 120, 120

# What each part may import of the others. "" stands for the package's own __init__ and its public names.
ALLOWED = {
    "_core": {"_core"},
    "ops": {"_core", "ops"},
    "testing": {"_core", "testing"},
    "nn": {"_core", "ops", "nn", ""},
    "kv_cache": {"_core", "ops", ""},
    "tuning": {"_core", "testing", "tuning"},
    "crossover": {"_core", "ops", "testing", "tuning"},
    "interop": {"_core", ""},
    "convert": {"_core", "ops", "nn", "convert", ""},
    "warm": {"_core", "patch", "warm"},
    "patch": {"_core", "ops", "nn", "kv_cache", "testing", "convert", "patch", ""},
}
# The one way from dispatch to the emulator, taken by the first call that asks for it.
EMULATION, EMULATOR = "fusedops/_core/emulation.py", "fusedops.testing.ptx."
LAZY_ONLY = (
    *("triton", "transformers", "numpy", "hypothesis", "pytest"),
    *("gguf", "accelerate", "rich", "matplotlib", "cupy"),
)


@dataclass(frozen=True)
class Import:
    """One imported name with the line, and whether it is imported only when a function runs."""

    name: str
    line: int
    lazy: bool

    @property
    def top(self):
        return self.name.split(".")[0]

    @property
    def part(self):
        """The part of fusedops that is imported, "" for a public name, None for another package."""
        if self.top != "fusedops":
            return None
        second = (self.name.split(".") + [""])[1]
        return second if second in {*ALLOWED, "cli"} else ""


@dataclass
class Source:
    """One file: its path inside the repository and its text."""

    path: str
    text: str

    @cached_property
    def tree(self):
        return ast.parse(self.text)

    @property
    def parts(self):
        """Folders and file name below fusedops/, such as ("ops", "rms_norm", "_triton.py")."""
        return PurePosixPath(self.path).parts[1:]

    @property
    def part(self):
        return self.parts[0].removesuffix(".py") if self.parts[0] != "__init__.py" else ""

    @property
    def operator(self):
        return self.parts[1] if self.part == "ops" and len(self.parts) > 2 else None

    @property
    def is_kernel(self):
        return self.operator is not None and self.parts[2].split(".")[0] in ("_triton", "_torch", "_cuda")

    @property
    def may_import_triton(self):
        in_operator = self.operator is not None and self.parts[2].split(".")[0] == "_triton"
        return in_operator or self.parts in (("_core", "tl.py"), ("_core", "tl_epilogue.py"), ("_core", "gl.py"))

    @cached_property
    def imports(self):
        return list(self._imports(self.tree, lazy=False))

    def _imports(self, node, lazy):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = self._absolute(node)
            yield from (Import(f"{module}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, lazy)
        inner = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        inner |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from self._imports(child, inner)

    def _absolute(self, node):
        if not node.level:
            return node.module
        package = PurePosixPath(self.path).parts[: -node.level]
        return ".".join([*package, *filter(None, [node.module])])

    @cached_property
    def functions(self):
        return [node for node in ast.walk(self.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def reference_imports_torch_only(source):
    if source.operator and source.parts[-1] == "reference.py":
        for found in source.imports:
            if found.top not in ("torch", "__future__"):
                yield found.line, f"a reference imports torch only, not {found.name}"


def kernels_stand_alone(source):
    for found in source.imports:
        other = found.name.split(".")
        if source.is_kernel and ("reference" in other[:-1] or other[-1] == "reference"):
            yield found.line, f"a kernel must not import the reference: {found.name}"
        if source.operator and other[:2] == ["fusedops", "ops"] and len(other) > 2 and other[2] != source.operator:
            if source.is_kernel or len(other) > 3 and (other[3].startswith("_") or other[3] == "reference"):
                yield found.line, f"an operator's files must not import another operator's: {found.name}"


def layers_point_down(source):
    allowed = ALLOWED.get(source.part)
    for found in source.imports:
        if found.name == "fusedops" and found.lazy:
            continue  # the bare package names no operator; explain looks the public function up in it
        if source.path == EMULATION and found.lazy and found.name.startswith(EMULATOR):
            continue
        if allowed is not None and found.part is not None and found.part not in allowed:
            yield found.line, f"{source.part} must not import {found.name}"


def kernels_are_reached_through_their_operator(source):
    for found in source.imports:
        names = found.name.split(".")
        private = names[:2] == ["fusedops", "ops"] and len(names) > 3 and names[3] in ("_triton", "_torch", "_cuda")
        if private and source.part != "ops":
            yield found.line, f"only the operator imports its implementations: {found.name}"


def optional_packages_are_lazy(source):
    for found in source.imports:
        if found.top == "triton" and source.may_import_triton:
            continue
        if found.top in LAZY_ONLY and not found.lazy:
            yield found.line, f"{found.top} must be imported inside a function"
        if found.top == "transformers" and source.part not in ("patch", "cli"):
            yield found.line, "transformers is for patch/ and cli/"


def shipped_testing_needs_torch_alone(source):
    for found in source.imports:
        known = found.top in sys.stdlib_module_names or found.top in ("torch", "fusedops")
        if source.part == "testing" and not known and (not found.lazy or found.top not in LAZY_ONLY):
            yield found.line, f"testing imports torch, not {found.name}"


def nobody_imports_tests(source):
    for found in source.imports:
        if found.top in ("tests", "benchmarks"):
            yield found.line, f"nobody imports {found.top}"


def no_star_no_bare_except_no_autotune(source):
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield node.lineno, "import * hides where a name comes from"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "a bare except catches everything"
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton"):
            names += [alias.name for alias in node.names]
        if "autotune" in names:
            yield node.lineno, "triton.autotune tunes in the serving path"


def sizes(source):
    lines = source.text.splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield MAX_FILE_LINES, f"a file has at most {MAX_FILE_LINES} lines, this one {len(lines)}"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            yield number, f"a line has at most {MAX_COLUMNS} columns, this one {len(line)}"
    for function in source.functions:
        is_kernel = any("jit" in ast.unparse(mark) for mark in function.decorator_list)
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
        length = code_lines(function)
        if length > limit:
            yield function.lineno, f"{function.name} has {length} lines without its docstring, at most {limit} fit"


def code_lines(function):
    """Lines of a function from its def to its end, without the docstring."""
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        length -= function.body[0].end_lineno - function.body[0].lineno + 1
    return length


def ops_package_is_empty(source):
    if source.path == "fusedops/ops/__init__.py" and source.text.strip():
        yield 1, "re-exporting in ops/ hides the folder behind the function"


RULES = [
    reference_imports_torch_only,
    kernels_stand_alone,
    layers_point_down,
    kernels_are_reached_through_their_operator,
    optional_packages_are_lazy,
    shipped_testing_needs_torch_alone,
    nobody_imports_tests,
    no_star_no_bare_except_no_autotune,
    sizes,
    ops_package_is_empty,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    broken = []
    for path in FILES:
        source = Source(path, (ROOT / path).read_text())
        broken += [f"{path}:{line}: {what}" for line, what in rule(source)]
    assert not broken, "\n" + "\n".join(broken)


def test_files_are_found():
    assert len(FILES) > 20 and "fusedops/testing/accuracy.py" in FILES


def long_function(name, num_lines, mark=""):
    return f"{mark}def {name}():\n" + "    x = 1\n" * (num_lines - 1)


NORM, OTHER = "fusedops/ops/rms_norm", "fusedops.ops.layer_norm"
PLANTED = [
    (reference_imports_torch_only, f"{NORM}/reference.py", "import torch\nimport math\n"),
    (reference_imports_torch_only, f"{NORM}/reference.py", "def f():\n    from . import _torch\n"),
    (kernels_stand_alone, f"{NORM}/_triton.py", "from . import reference\n"),
    (kernels_stand_alone, f"{NORM}/_torch.py", "from fusedops.ops.rms_norm.reference import rms_norm\n"),
    (kernels_stand_alone, f"{NORM}/_triton/forward.py", f"from {OTHER} import layer_norm\n"),
    (kernels_stand_alone, f"{NORM}/__init__.py", f"import importlib\nimportlib.import_module('{OTHER}._triton')\n"),
    (layers_point_down, "fusedops/_core/dispatch.py", "def f():\n    from fusedops.ops import rms_norm\n"),
    (layers_point_down, "fusedops/_core/dispatch.py", "from fusedops import rms_norm\n"),
    (layers_point_down, "fusedops/_core/dispatch.py", "import fusedops\n"),
    (layers_point_down, "fusedops/_core/dispatch.py", "def f():\n    from fusedops.testing.ptx import build\n"),
    (layers_point_down, "fusedops/_core/emulation.py", "from fusedops.testing.ptx import build\n"),
    (layers_point_down, "fusedops/_core/emulation.py", "def f():\n    from fusedops.testing import inputs\n"),
    (layers_point_down, f"{NORM}/__init__.py", "from ...patch import patch\n"),
    (layers_point_down, "fusedops/nn/norm.py", "import fusedops.cli.main\n"),
    (layers_point_down, "fusedops/testing/accuracy.py", "from fusedops.ops.rms_norm import rms_norm\n"),
    (kernels_are_reached_through_their_operator, "fusedops/patch/a.py", "from fusedops.ops.rms_norm import _triton\n"),
    (optional_packages_are_lazy, "fusedops/_core/tuner.py", "import triton\n"),
    (optional_packages_are_lazy, "fusedops/_core/a.py", "try:\n    import numpy\nexcept ImportError:\n    pass\n"),
    (optional_packages_are_lazy, "fusedops/cli/demo.py", "from transformers import AutoModel\n"),
    (optional_packages_are_lazy, f"{NORM}/__init__.py", "def f():\n    import transformers\n"),
    (optional_packages_are_lazy, f"{NORM}/_torch.py", "import triton\n"),
    (shipped_testing_needs_torch_alone, "fusedops/testing/inputs.py", "import scipy\n"),
    (shipped_testing_needs_torch_alone, "fusedops/testing/inputs.py", "def f():\n    import scipy\n"),
    (nobody_imports_tests, "fusedops/cli/bench.py", "def f():\n    from benchmarks import _common\n"),
    (no_star_no_bare_except_no_autotune, f"{NORM}/__init__.py", "from torch import *\n"),
    (no_star_no_bare_except_no_autotune, f"{NORM}/__init__.py", "try:\n    pass\nexcept:\n    pass\n"),
    (no_star_no_bare_except_no_autotune, f"{NORM}/_triton.py", "@triton.autotune(configs=[], key=[])\ndef f(): pass\n"),
    (no_star_no_bare_except_no_autotune, f"{NORM}/_triton.py", "from triton import autotune\n"),
    (sizes, "fusedops/a.py", "\n" * (MAX_FILE_LINES + 1)),
    (sizes, "fusedops/a.py", "#" * (MAX_COLUMNS + 1)),
    (sizes, "fusedops/a.py", long_function("f", MAX_FUNCTION_LINES + 1)),
    (sizes, "fusedops/a.py", long_function("f", MAX_KERNEL_LINES + 1, mark="@triton.jit\n")),
    (ops_package_is_empty, "fusedops/ops/__init__.py", "from .rms_norm import rms_norm\n"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_the_rule_finds_a_planted_violation(rule, path, text):
    assert list(rule(Source(path, text)))


def test_every_rule_has_a_planted_violation():
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (f"{NORM}/_triton.py", "import triton\nfrom fusedops._core.tl import row_offsets\n"),
        (f"{NORM}/__init__.py", "def f():\n    from . import _triton, _torch, reference\n"),
        ("fusedops/testing/interpreter.py", "import torch\ndef f():\n    import numpy\n    import triton\n"),
        ("fusedops/testing/strategies.py", "if TYPE_CHECKING:\n    import hypothesis\n"),
        ("fusedops/patch/llama.py", "from fusedops import rms_norm\ndef f():\n    import transformers\n"),
        ("fusedops/_core/emulation.py", "def f():\n    from fusedops.testing.ptx.launches import diverted\n"),
        ("fusedops/_core/a.py", long_function("f", MAX_FUNCTION_LINES)),
        ("fusedops/_core/a.py", long_function("f", MAX_KERNEL_LINES, mark="@triton.jit\n")),
    ],
)
def test_what_is_allowed_passes(path, text):
    assert [what for rule in RULES for what in rule(Source(path, text))] == []


def run_python(code):
    """Run code in a fresh process and return what it prints."""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_import_loads_nothing_beyond_torch_and_stays_off_the_gpu():
    code = """
import sys, time, torch
before = {name.split(".")[0] for name in sys.modules}
start = time.process_time()
import fusedops
seconds = time.process_time() - start
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - set(sys.stdlib_module_names) - {"fusedops"}), torch.cuda.is_initialized(), seconds)
"""
    modules, initialised, seconds = run_python(code).rsplit(" ", 2)
    assert modules == "[]" and initialised == "False"
    assert float(seconds) < 0.5


def test_everything_public_works_without_the_optional_packages():
    code = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {LAZY_ONLY!r} and name.split(".")[0] != "numpy":
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
import torch, fusedops, fusedops.testing
x, weight = torch.randn(3, 64), torch.randn(64)
truth = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
fusedops.testing.assert_accurate(fusedops.rms_norm(x, weight), truth)
assert "triton" not in sys.modules and "transformers" not in sys.modules
for name in ("strategies.dtypes", "interpreter.install"):
    module, function = name.split(".")
    try:
        getattr(getattr(fusedops.testing, module), function)()
    except ImportError as error:
        print(error)
"""
    printed = run_python(code)
    assert "strategies needs hypothesis" in printed and "interpreter needs triton" in printed

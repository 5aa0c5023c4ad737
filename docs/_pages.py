"""MkDocs hook: pages that are made from the code, one for each operator's folder and one of environment variables."""

import ast
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fusedops"


def on_config(config):
    """Put the operators' pages into the navigation."""
    for entry in config.nav:
        if "Operators" in entry:
            entry["Operators"] = [{folder: f"operators/{folder}.md"} for folder in operators()]
    return config


def on_files(files, config):
    """Add the pages themselves."""
    for folder, names in operators().items():
        doc = ast.get_docstring(ast.parse((PACKAGE / "ops" / folder / "__init__.py").read_text()))
        text = f"# {folder}\n\n{doc}\n\n" + "\n\n".join(f"::: fusedops.{name}" for name in names)
        text += support(folder)
        text += f"\n\n## What it means\n\n```python\n{(PACKAGE / 'ops' / folder / 'reference.py').read_text()}```\n"
        files.append(page(config, f"operators/{folder}.md", text))
    files.append(page(config, "environment.md", environment()))
    return files


def page(config, path, text):
    """A page that has no file in the docs folder."""
    return File.generated(config, path, content=text, inclusion=InclusionLevel.INCLUDED)


def operators():
    """Folder to public names, from the import lines of the package."""
    found = {}
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fusedops.ops."):
            found[node.module.rpartition(".")[2]] = [alias.name for alias in node.names]
    return found


def support(folder):
    """The table of what each way takes, of the operators that have one, from the module that the code asks."""
    source = PACKAGE / "ops" / folder / "_support.py"
    if not source.exists():
        return ""
    rows = ["\n\n## Who takes what", ""]
    rows += ["| feature | Triton kernels | CPU: torch's fused kernel | CPU and other devices: matmuls | gradient |"]
    rows += ["|---|---|---|---|---|"]
    for feature, (capability, fused, gradient) in literal(source, "SUPPORT").items():
        needs = f"compute capability {capability // 10}.{capability % 10} and newer"
        marks = {True: "yes", False: "no", None: "-"}
        rows.append(f"| {feature} | {needs} | {marks[fused]} | yes | {marks[gradient]} |")
    return "\n".join(rows)


def literal(source, name):
    """The value of a constant of a module, without importing it."""
    body = ast.parse(source.read_text()).body
    return ast.literal_eval(next(n.value for n in body if isinstance(n, ast.Assign) and n.targets[0].id == name))


def environment():
    """The table of environment variables, from the module that reads them."""
    source = PACKAGE / "_core" / "env.py"
    rows = ["# Environment variables", "", ast.get_docstring(ast.parse(source.read_text())), ""]
    rows += ["| variable | values | meaning |", "|---|---|---|"]
    for name, (choices, meaning) in literal(source, "VARIABLES").items():
        values = ", ".join(f"`{value}`" for value in choices) if choices else "a directory"
        rows.append(f"| `{name}` | {values} | {meaning} |")
    return "\n".join([*rows, "", "The first value is the default.", ""])

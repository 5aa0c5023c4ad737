"""From a kernel and the arguments of a launch to PTX, without a driver, and kept on disk.

A process that imported triton with ``TRITON_INTERPRET=1`` cannot compile; there a child process does it, started when
the first kernel is not found on disk, and ended with its parent.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from fusedops._core import env
from fusedops._core.binding import Binding
from fusedops._core.files import write_whole

# What a launch needs to know of a compiled kernel.
_METADATA = (
    "name", "shared", "num_warps", "num_ctas", "tensordesc_meta", "global_scratch_size", "global_scratch_align",
    "profile_scratch_size", "profile_scratch_align",
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """PTX and what a launch of it needs.

    Attributes:
        ptx: The text.
        metadata: Triton's: ``name``, ``shared`` bytes, ``num_ctas``, ``tensordesc_meta``, scratch sizes.
    """

    ptx: str
    metadata: dict


class CompileError(RuntimeError):
    """Triton refused a kernel; the message has its own words."""


def compile_kernel(binding: Binding) -> Compiled:
    """Compile a bound kernel to PTX, or find it on disk.

    Raises:
        CompileError: Triton cannot compile it.
        ValueError: a kernel must be compiled in a child process and cannot be found by an import.
    """
    return _from_disk(binding.key(), binding)


_known: dict[str, Compiled] = {}


def _from_disk(key: str, binding: Binding) -> Compiled:
    found = _known.get(key)
    if found is None:
        path = env.cache_dir() / "ptx" / "kernels" / f"{key}.json"
        try:
            found = Compiled(**json.loads(path.read_text()))
        except (OSError, ValueError):
            found = _compile_anywhere(binding)
            write_whole(path, json.dumps({"ptx": found.ptx, "metadata": found.metadata}))
        _known[key] = found
    return found


def _compile_anywhere(binding: Binding) -> Compiled:
    from triton import knobs

    if knobs.runtime.interpret:
        from fusedops.testing.ptx import worker

        return Compiled(*worker.compile_in_child(binding))
    try:
        return Compiled(*compile_here(binding))
    except Exception as error:
        raise CompileError(f"ptx: {binding.name} does not compile: {error}") from error


def compile_here(binding: Binding) -> tuple[str, dict]:
    """Run the stages of Triton's compiler up to PTX; ptxas, which takes half the time of a compilation, is left out."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    source = _source_class(binding.function)(binding.function, binding.signature, binding.constants, binding.attributes)
    target = GPUTarget("cuda", binding.capability, 32)
    backend, options = make_backend(target), binding.options
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata = {"target": target, **vars(options)}
    names = list(stages)
    for name in names[names.index(source.ext) : names.index("ptx") + 1]:
        module = stages[name](module, metadata)
    return module, {name: metadata[name] for name in _METADATA if name in metadata}


@functools.cache
def _source_class(function):
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource if function.is_gluon() else ASTSource

"""What makes Triton's interpreter do less work of its own; `fusedops.testing.interpreter` puts it in its place."""

from __future__ import annotations

from collections.abc import Callable


def patch_once(module) -> Callable:
    """Put the interpreter's functions into triton.language once a launch, not at each call of a jitted function.

    That is idempotent while a launch lasts, and took a third of a launch's time.
    """
    import triton.language as tl

    original, patched = module._patch_lang, []

    class Scope(module._LangPatchScope):
        def restore(self):
            super().restore()
            patched.clear()

    def patch_lang(function):
        languages = [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]
        if languages and all(lang in patched for lang in languages):
            return Scope()
        scope = Scope()
        scope._changes = original(function)._changes
        patched.extend(languages)
        return scope

    return patch_lang


def known_dtypes(original: Callable) -> Callable:
    """The numpy dtype of a type, from a table that is made once instead of at each call."""
    known: dict = {}

    def numpy_dtype(triton_dtype):
        name = triton_dtype.scalar.name
        if name not in known:
            known[name] = original(triton_dtype)
        return known[name]

    return numpy_dtype


def known_shapes(block_type: Callable, tensor: Callable) -> tuple[Callable, Callable]:
    """Initialisers of block types and tensors that check and describe a shape the first time that it is seen.

    Both were done anew for the result of each operation, which took an eighth of a test's time.
    """
    import triton.language as tl

    types: dict = {}
    tensors: dict = {}

    def block_type_init(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        key = element_ty.name, sizes, tuple(map(type, sizes))  # 16.0 == 16, and is no size
        known = types.get(key)
        if known is None:
            block_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = known

    def tensor_init(self, handle, type):
        shape = type.shape if type.is_block() else ()
        known = tensors.get(id(shape))
        if known is None or known[0] is not shape:
            tensor(self, handle, type)
            tensors[id(shape)] = shape, self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            _, self.shape, self.numel = known

    return block_type_init, tensor_init

"""transformers' continuous batching, its scheduler and its server, on a model with our attention.

The engine (`generate_batch`, `continuous_batching_context_manager`, `init_continuous_batching`, ``transformers serve``)
asks a model's config for the name of its attention, and accepts "sdpa", "paged|eager" and names with "flash" in them.
All of that happens while a manager and its cache are made, through the manager's model. So a patched model gives it a
stand-in: the same model with a config that says "fusedops_flash2", for which no masks are built and, on a GPU, decoding
gets a block table. The real config goes on saying "fusedops", and nothing that another thread sees changes.
"""

import contextlib
import copy
import threading
import weakref
from functools import partial

import torch

from fusedops.patch import continuous_attention, masks
from fusedops.patch.attention import IMPLEMENTATION, NAME, enable_paged
from fusedops.patch.instance import ENGINE_ATTRIBUTE, State

METHOD = "init_continuous_batching"
CACHED = "_cached_continuous_batching_manager"
SUPPORTED = "5.23"  # the engine's internals changed between all releases that were looked at
ENGINE_NAME = "fusedops_flash2"  # with flash: no masks; with 2: a block table where there is CUDA

_managers = weakref.WeakSet()
_import_lock = threading.Lock()
_LOADED = (
    *("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"),
    *("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"),
)


class EngineState(State):
    """State of a model whose continuous batching runs on our attention."""

    __slots__ = ()
    attribute = ENGINE_ATTRIBUTE

    def __init__(self):
        super().__init__(init_continuous_batching, METHOD)

    def obstacle(self, module):
        """Why the state cannot be taken away now, or None."""
        value = vars(module).get(METHOD)
        if value is not None and getattr(value, "func", None) is not self.function:
            return f"{METHOD} of a {type(module).__name__} was replaced after patching; undo that first"
        if any(manager.model.is_of(module) and manager.is_running() for manager in list(_managers)):
            return f"continuous batching of a {type(module).__name__} is running; stop() its manager first"
        return None

    def restore(self, module):
        """Take the instance attributes away, and a manager that was kept for the next session."""
        cached = vars(module).get(CACHED)
        if isinstance(getattr(cached, "model", None), EngineModel):
            module.destroy_cached_continuous_batching_manager()
        vars(module).pop(METHOD, None)
        del vars(module)[self.attribute]


def find_engine(module):
    """The EngineState of a module that has continuous batching, or None."""
    if not callable(getattr(type(module), METHOD, None)) or METHOD in vars(module):
        return None
    return EngineState()


def unsupported():
    """Why continuous batching cannot run on our attention with this transformers, or None."""
    import transformers

    found = f"transformers {transformers.__version__}"
    if not transformers.__version__.startswith(f"{SUPPORTED}."):
        return f"it is supported with transformers {SUPPORTED} alone, got {found}"
    try:
        from transformers import modeling_flash_attention_utils as flash
        from transformers.generation.continuous_batching import cache_allocators, continuous_api
    except ImportError as error:
        return f"{found} has it elsewhere ({error})"
    full = getattr(cache_allocators, "FullAttentionCacheAllocator", None)
    ring = getattr(cache_allocators, "SlidingAttentionCacheAllocator", None)
    used = [(full, name) for name in ("update", "get_cache_for_block_table", "layer_type")] + [(ring, "update")]
    used += [(continuous_api.ContinuousBatchingManager, "is_running"), (flash, "_lazy_imports")]
    used += [(flash, name) for name in _LOADED]
    missing = [name for owner, name in used if not hasattr(owner, name)]
    return f"{found} lacks {', '.join(missing)}" if missing else None


def init_continuous_batching(model, *args, **kwargs):
    """transformers' method of the same name, on a model with our attention."""
    stock = getattr(type(model), METHOD)
    if getattr(model.config.get_text_config(), IMPLEMENTATION) != NAME:
        return stock(model, *args, **kwargs)
    reason = unsupported()
    if reason is not None:
        raise NotImplementedError(f"patch: no continuous batching on a patched model: {reason}; undo() first")
    enable_paged()
    with _flash_importable():
        manager = stock(EngineModel(model), *args, **kwargs)
    if isinstance(manager.model, EngineModel):  # a manager that was kept since before patching has the model itself
        _managers.add(manager)
    return manager


class EngineModel:
    """A patched model as the engine sees it: all is the model's, but the config names an attention that it accepts."""

    __slots__ = ("__weakref__", "_model")

    def __init__(self, model):
        object.__setattr__(self, "_model", model)

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __setattr__(self, name, value):
        setattr(self._model, name, value)

    def __delattr__(self, name):
        delattr(self._model, name)

    @property
    def config(self):
        """A copy of the model's config with the other name."""
        return _renamed(self._model.config)

    def eval(self):
        """As `torch.nn.Module.eval`."""
        self._model.eval()
        return self

    def is_of(self, model):
        """Whether it stands for this model."""
        return self._model is model

    def __call__(self, **inputs):
        """The model's forward. Its masks are ours to know: a tensor of four dimensions keeps the model from making any.

        Raises:
            RuntimeError: the model has another attention by now, for which this manager has built no masks.
        """
        model = self._model
        name = getattr(model.config.get_text_config(), IMPLEMENTATION)
        if name != NAME:
            raise RuntimeError(
                f"patch: the attention of this {type(model).__name__} was {NAME} when its manager for continuous "
                f"batching was made, and is {name} now; make another manager"
            )
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.empty((1, 1, 1, 0), dtype=masks.SHORT, device=inputs["input_ids"].device)
        inputs[continuous_attention.STEP] = continuous_attention.Step()
        return model(**inputs)


def _renamed(config):
    """A shallow copy of a config, and of the configs inside it, with our name replaced by the engine's."""
    config = copy.copy(config)
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if inner is not None:
            vars(config)[name] = _renamed(inner)
    if getattr(config, IMPLEMENTATION, None) == NAME:
        setattr(config, IMPLEMENTATION, ENGINE_NAME)
    return config


@contextlib.contextmanager
def _flash_importable():
    """Inside, transformers finds that the package behind the engine's name is there, with a block table.

    On a GPU it looks for that package's functions, but calls none of them: our attention is called by the models.
    """
    from transformers import modeling_flash_attention_utils as flash

    with _import_lock:
        before = {name: getattr(flash, name) for name in _LOADED}
        lazy_imports = flash._lazy_imports
        flash._lazy_imports = partial(_lazy_imports, lazy_imports)
        try:
            yield
        finally:
            flash._lazy_imports = lazy_imports
            if flash._loaded_implementation == ENGINE_NAME:
                vars(flash).update(before)


def _lazy_imports(stock, implementation, *args, **kwargs):
    """(plain, varlen, with a block table, pad, unpad) functions of a flash package."""
    if implementation == ENGINE_NAME:
        return None, None, _never_called, None, None
    return stock(implementation, *args, **kwargs)


def _never_called(*args, **kwargs):
    raise AssertionError(f"a model calls the functions of {ENGINE_NAME} instead of its attention")

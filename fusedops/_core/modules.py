"""Running any model as it is, and what stands on a module's instance."""

import contextlib
import inspect
from collections.abc import Mapping

import torch


@contextlib.contextmanager
def evaluating(model):
    """No gradients, every module in evaluation mode, and modes and random numbers as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def without_cache(model):
    """The argument by which a model of transformers keeps no cache; empty for one that does not know it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}


def float_tensors(out):
    """The floating tensors of an output, in order, whatever holds them."""
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, list | tuple) else ()
    return [tensor for value in values for tensor in float_tensors(value)]


def foreign_attribute(module, name="forward"):
    """What something has set on the instance in place of its class's forward, or None.

    The class's own forward, bound, which accelerate's hook leaves behind when it is removed, does not count.
    """
    value = module.__dict__.get(name)
    is_own = getattr(value, "__func__", None) is type(module).forward and getattr(value, "__self__", None) is module
    return None if is_own else value

"""What a replaced module carries: one instance attribute with its state, one with its new forward.

The new forward is ``functools.partial(function, module)`` with a function of this package. Such a partial is called as
fast as a bound method, and it survives `copy.deepcopy` and `pickle` as what it is. (A bound method would be pickled by
its name, which brings the stock forward back and leaves the attribute behind.) An attention keeps its forward, and has
a state only: see `fusedops.patch.attention`.
"""

from functools import partial
from types import MethodType

import torch

from fusedops._core.dispatch import apply_fallback_policy
from fusedops._core.modules import foreign_attribute

ATTRIBUTE = "_fusedops"
ATTENTION_ATTRIBUTE = "_fusedops_attention"  # an attention can be replaced and its rotary function too
ENGINE_ATTRIBUTE = "_fusedops_engine"  # of the model that has continuous batching
HOOKED_SLOT = "_old_forward"  # where accelerate keeps the forward that its hook wraps

# What the operators raise before they do anything for arguments they do not take.
UNSUPPORTED = (TypeError, ValueError, NotImplementedError)


class State:
    """What a replaced module carries in its ``_fusedops`` attribute.

    Attributes:
        slot: Name of the instance attribute that was set: forward, accelerate's _old_forward, or _apply_gate.
        previous: The slot's value before, in a tuple; an empty tuple where there was none.
        function: The function of this package that the slot calls with the module.
        fallbacks: Number of calls that the module's own code answered, by reason.
    """

    __slots__ = ("fallbacks", "function", "previous", "slot")
    attribute = ATTRIBUTE

    def __init__(self, function, slot="forward"):
        self.function = function
        self.slot = slot
        self.previous = ()
        self.fallbacks = {}

    def install(self, module):
        """Set the two instance attributes of a module."""
        attributes = module.__dict__
        if self.slot in attributes:
            self.previous = (attributes[self.slot],)
        attributes[self.attribute] = self
        attributes[self.slot] = partial(self.function, module)

    def obstacle(self, module):
        """Why `restore` must not be called now, or None; a slot that is simply gone needs no restoring."""
        if place_of(module) is None and self.slot in module.__dict__:
            return f"the forward of a {type(module).__name__} was replaced after patching; undo that first"
        return None

    def restore(self, module):
        """Put back what `install` replaced."""
        attributes = module.__dict__
        slot = place_of(module)
        if slot is not None:
            if self.previous:
                attributes[slot] = self.previous[0]
            elif slot == HOOKED_SLOT:
                attributes[slot] = MethodType(type(module).forward, module)
            else:
                del attributes[slot]
        del attributes[self.attribute]

    def stock(self, module):
        """The function that the replacement stands for, from the module's class."""
        return getattr(type(module), "forward" if self.slot == HOOKED_SLOT else self.slot)

    def run_stock(self, module, reason, args, kwargs):
        """Run the module's own code for arguments that the operator does not take."""
        record_fallback(self.fallbacks, type(module).__name__, reason, args)
        return self.stock(module)(module, *args, **kwargs)


def record_fallback(fallbacks, name, reason, args):
    """Count a call that the model's own code answers; on a GPU, do what FUSEDOPS_FALLBACK says.

    Raises:
        RuntimeError: an argument is a CUDA tensor, and the policy is "raise".
    """
    reason = str(reason)
    seen = reason in fallbacks
    fallbacks[reason] = fallbacks.get(reason, 0) + 1
    if any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args):
        message = f"patch: {name} runs its own code instead of a fused operator ({reason})"
        apply_fallback_policy(message, seen, stacklevel=5)


def install(module, state):
    """Make a module the replaced one that its state describes."""
    state.install(module)


def state_of(module):
    """The module's State, or None where it is not replaced."""
    state = module.__dict__.get(ATTRIBUTE)
    return state if isinstance(state, State) else None


def states_of(module):
    """Every State of a module that is replaced."""
    found = (module.__dict__.get(name) for name in (ATTRIBUTE, ATTENTION_ATTRIBUTE))
    return [state for state in found if isinstance(state, State)]


def all_states(model):
    """(module, State) of everything that was set in a model."""
    engines = ((module, module.__dict__.get(ENGINE_ATTRIBUTE)) for module in model.modules())
    found = [(module, state) for module, state in engines if isinstance(state, State)]
    return found + [(module, state) for module in model.modules() for state in states_of(module)]


def carries(module, state):
    """Whether a module is replaced as this State says."""
    return module.__dict__.get(state.attribute) is state


def place_of(module):
    """Name of the instance attribute that holds our function now, or None where something else took its place.

    accelerate moves a forward that it finds to ``_old_forward``, and back when its hook is removed.
    """
    state = module.__dict__[ATTRIBUTE]
    for slot in (state.slot, "forward", HOOKED_SLOT):
        value = module.__dict__.get(slot)
        if isinstance(value, partial) and value.func is state.function and value.args == (module,):
            return slot
    return None


def foreign_forward(module):
    """(slot to use, who else set it): the second is None where nobody did.

    accelerate's hook is no obstacle, we go underneath it.
    """
    attributes = module.__dict__
    slot = HOOKED_SLOT if "_hf_hook" in attributes and HOOKED_SLOT in attributes else "forward"
    return slot, foreign_attribute(module, slot)

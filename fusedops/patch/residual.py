"""Residual additions that a norm follows: found in the source of a decoder layer's forward, computed in one pass.

In the instance's own copy of the stock forward, ``residual + x`` becomes a call that adds and normalises together and
leaves the norm's result with the norm; the norm, still called where it always was, picks it up. For the addition at
the end of a layer, the norm is the one that the next layer (or the model) applies first.
"""

import ast

import torch

from fusedops.patch import rebuild
from fusedops.patch.instance import State
from fusedops.patch.norms import add_then_norm

ADD, ADD_LAST = "_fusedops_add", "_fusedops_add_last"

_is_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled


class ResidualState(State):
    """State of a decoder layer whose additions are replaced.

    Attributes:
        call: The rewritten forward; built anew in a copy or after a pickle.
        owner: The layer's class.
        norms: Names of the layer's replaced norms.
        next_norm: The norm that gets the layer's output, or None.
        wall_is_clear: Whether nothing in the loop over the layers can change the output before that norm gets it.
        next_hooks: The next layer's own table of pre-hooks, which may change it all the same.
    """

    __slots__ = ("call", "next_hooks", "next_norm", "norms", "owner", "wall_is_clear")

    def __init__(self, owner, norms, next_norm, wall_is_clear, next_hooks, call=None):
        super().__init__(residual_forward)
        self.owner = owner
        self.norms = norms
        self.next_norm = next_norm
        self.wall_is_clear = wall_is_clear
        self.next_hooks = next_hooks
        self.call = call or rewritten_forward(owner, norms, next_norm is not None)[0]

    def __reduce__(self):
        return _new_state, (), (None, {name: getattr(self, name) for name in (*_COPIED, "fallbacks")})

    def __setstate__(self, state):
        for name, value in state[1].items():
            setattr(self, name, value)
        self.call = rewritten_forward(self.owner, self.norms, self.next_norm is not None)[0]


_COPIED = ("owner", "norms", "next_norm", "wall_is_clear", "next_hooks", "slot", "previous", "function")


def _new_state():
    return object.__new__(ResidualState)


def residual_forward(self, *args, **kwargs):
    """Forward of a decoder layer; gradients and the compiler get the stock one."""
    if _is_compiling() or _is_grad_enabled():
        return type(self).forward(self, *args, **kwargs)
    return self._fusedops.call(self, *args, **kwargs)


def add_last(residual, x, layer):
    """``residual + x`` at the end of a layer, normalised for the next one.

    Inference tensors do not tell whether they were changed in place, so for them nothing may stand in between.
    """
    state = layer._fusedops
    clear = state.wall_is_clear and not layer._forward_hooks and not state.next_hooks
    if not clear and torch.is_inference_mode_enabled():
        return residual + x
    return add_then_norm(residual, x, state.next_norm)


def rewritten_forward(owner, norms, has_next):
    """(forward, number of additions) of a layer class, with the additions before these norms replaced.

    Raises:
        CannotRebuildError: there is no such addition, or the forward cannot be built again.
    """
    count = 0

    def change(forward):
        nonlocal count
        definition = rebuild.parse(forward)
        count = _replace_additions(definition, norms, has_next)
        if not count:
            raise rebuild.CannotRebuildError("its forward has no addition that is followed by a replaced norm")
        return rebuild.compiled(forward, definition, {ADD: add_then_norm, ADD_LAST: add_last})

    return rebuild.rewrap(owner.forward, change), count


def entry_norm(layer, norms):
    """Name of the norm that a layer applies to its input, or None."""
    try:
        definition = rebuild.parse(rebuild.innermost(type(layer).forward))
    except (rebuild.CannotRebuildError, AttributeError):
        return None
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    if len(arguments) < 2:
        return None
    names = {arguments[1].arg}
    for statement in definition.body:
        norm = _norm_call(statement, arguments[0].arg, names, norms)
        if norm is not None:
            return norm.func.attr
        if _is_alias(statement, names):
            names.add(statement.targets[0].id)
        else:
            names -= _stored(statement)
    return None


def loop_is_clear(owner, layers, norm=None):
    """Whether the loop over the layers in `owner.forward` only hands each output to the next layer.

    Args:
        owner: Class of the module that holds the layers.
        layers: Name of its list of layers.
        norm: Name of the norm that must come right after the loop.
    """
    try:
        definition = rebuild.parse(rebuild.innermost(owner.forward))
    except (rebuild.CannotRebuildError, AttributeError):
        return False
    body = definition.body
    loops = [i for i, node in enumerate(body) if isinstance(node, ast.For) and _mentions(node.iter, layers)]
    if len(loops) != 1 or len(body[loops[0]].body) != 1:
        return False
    if norm is not None and not (loops[0] + 1 < len(body) and _mentions(body[loops[0] + 1], norm)):
        return False
    step = body[loops[0]].body[0]
    return isinstance(step, ast.Assign) and isinstance(step.targets[0], ast.Name) and isinstance(step.value, ast.Call)


def _mentions(node, attribute):
    return any(isinstance(part, ast.Attribute) and part.attr == attribute for part in ast.walk(node))


def _replace_additions(definition, norms, has_next):
    """Replace additions in the tree; their number."""
    if not definition.args.args:
        return 0
    owner = definition.args.args[0].arg
    body = definition.body
    count = 0
    for index, statement in enumerate(body):
        target = _addition(statement)
        if target is None:
            continue
        follower = _following_norm(body[index + 1 :], target, owner, norms)
        if follower is not None:
            # the dictionary, because an attribute that is a module takes nn.Module's slow way
            modules = ast.Attribute(ast.Name(owner, ast.Load()), "_modules", ast.Load())
            _set(statement, ADD, ast.Subscript(modules, ast.Constant(follower.func.attr), ast.Load()))
        elif has_next and _is_returned(body[index + 1 :], statement, target):
            _set(statement, ADD_LAST, ast.Name(owner, ast.Load()))
        else:
            continue
        count += 1
    ast.fix_missing_locations(definition)
    return count


def _set(statement, helper, argument):
    addition = statement.value
    call = ast.Call(ast.Name(helper, ast.Load()), [addition.left, addition.right, argument], [])
    statement.value = ast.copy_location(call, addition)


def _addition(statement):
    """Name that gets the sum in ``name = a + b``, "" for ``return a + b``, else None."""
    value = getattr(statement, "value", None)
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Add):
        return None
    if isinstance(statement, ast.Return):
        return ""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _following_norm(statements, target, owner, norms):
    """The call of a replaced norm on the sum, if nothing but other names for the sum stands in between."""
    names = {target}
    for statement in statements:
        if _is_alias(statement, names):
            names.add(statement.targets[0].id)
            continue
        return _norm_call(statement, owner, names, norms)
    return None


def _is_alias(statement, names):
    return (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Name)
        and statement.value.id in names
    )


def _norm_call(statement, owner, names, norms):
    """The call ``owner.norm(name)`` in a statement, for one of these names and norms, or None."""
    for node in ast.walk(statement):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == owner
            and node.func.attr in norms
            and [type(argument) for argument in node.args] == [ast.Name]
            and node.args[0].id in names
            and not node.keywords
        ):
            return node
    return None


def _is_returned(statements, addition, target):
    """Whether the sum is what the function returns, or the first of it, and is not given a new value before."""
    if target == "":
        return True
    if any(target in _stored(statement) for statement in statements):
        return False
    tuples = {target}
    for statement in statements:
        value = getattr(statement, "value", None)
        first = value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value
        if isinstance(first, ast.Name) and first.id in tuples:
            if isinstance(statement, ast.Return):
                return True
            tuples |= _stored(statement)
    return False


def _stored(statement):
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

"""One call registers an operator: schema, implementations, fake, autograd, and the short way of eager calls."""

import threading

import torch

from fusedops._core import dispatch, env, invariance, recent, replay
from fusedops._core.checks import FLOATS
from fusedops._core.device import interpreting
from fusedops._core.signature import PLAIN, signature
from fusedops._core.source import GIVEN, Source

_LIBRARY = torch.library.Library("fusedops", "DEF")
_OPERATORS = {}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_is_compiling = torch.compiler.is_dynamo_compiling
_included_keys = torch._C._dispatch_tls_local_include_set
# Dispatch keys that stand in every thread. A mode, a transform or a trace adds its own.
_UNUSUAL_KEYS = ~(
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()
_MAX_PLANS = 4096  # of one operator: signatures that were checked and selected


class _Plan:
    """What calls of one signature run: the implementation's function, and from the third call on its launches alone.

    Attributes:
        run: The function to call.
        count: The list whose one number counts its calls.
        device_index: The CUDA device that must be the current one, or None.
        settled: Whether `run` stays what it is.
        known: By whether it gives the first result alone: a call's values beside tensors, and what recognises it.
    """

    __slots__ = ("_function", "_replay", "count", "device_index", "known", "run", "settled")

    def __init__(self, function, count, device_index, launches):
        self._function = function
        self._replay = None
        self.settled = not launches or interpreting()
        self.known = {}
        self.count = count
        self.device_index = device_index
        self.run = function if self.settled else self._record

    def _record(self, *args):
        self.run = self._function  # for other threads, and where a call cannot be replayed
        result, self._replay = replay.record(self._function, args)
        if self._replay is not None:
            self.run = self._replay.whole.compile("replay")
        self.settled = True
        return result

    def recognising(self, given, first, arguments):
        """The function that runs the plan for what is given alone, or None.

        Args:
            given: What `again` was given.
            first: Whether the function is to give the first result alone.
            arguments: Function of what is given that gives the operator's arguments, or None where they are the same.
        """
        values = None if arguments is None else [one for one in given if not isinstance(one, torch.Tensor)]
        known, found = self.known.get(first, ((), None))
        if known == values:
            return found
        run = self._function if arguments is None else lambda *given: self._function(*arguments(*given))
        if self._replay is None:
            lines, names = [f"    return function({GIVEN}){'[0]' if first else ''}"], {}
        else:
            replayed = self._replay.first if first else self._replay.whole
            lines, names = replayed.lines, replayed.names
        source = Source(len(given), lines, {**names, "function": run})
        found = recent.recognising(source, given, self.count, self.device_index)
        self.known[first] = values, found
        return found


class Operator:
    """A registered operator. Calling it runs it; `operators()` lists every one.

    Attributes:
        name: Name under ``torch.ops.fusedops``.
        implementations: Names of the implementations, in the order in which they are tried on CUDA tensors.
        has_kernels: Whether any implementation is a kernel; else torch's operators are meant on every device.
        cost: Function of the operator's arguments that gives (bytes moved, operations), or None.
        example: Function (shape, dtype, device) that gives (args, kwargs) for the public function, or None.
        again: Function of the operator's arguments, or of what `arguments` makes them of: the result, where arguments
            like these have been checked before; None the first time. A function whose checks look at addresses (out,
            in place) must not call it.
        again_first: The same with the first of several results alone; the others are let go.
    """

    def __init__(self, schema, package, implementations, fake, cost, example, rows, arguments):
        self.name = schema.partition("(")[0]
        self.package = package
        self.implementations = implementations
        self.cost = cost
        self.example = example
        self._selector = dispatch.Selector(
            self.name, package, implementations, fake, _places(schema, rows), "!" in schema
        )
        self.has_kernels = self._selector.has_kernels
        self._op = None
        self._op_out = None
        self._keeps_plans = example is not None and "!" not in schema
        self._plans = {}
        self._signature = signature(schema) if self._keeps_plans else None
        self._changes = 0  # of what plans follow from
        self._lock = threading.Lock()
        self._recent = {}
        self._arguments = arguments
        if self._keeps_plans:
            number = (arguments or self._signature).__code__.co_argcount
            self._recent = {
                False: recent.Recent(number, lambda given: self._recall(given, False)),
                True: recent.Recent(number, lambda given: self._recall(given, True)),
            }
            self.again, self.again_first = self._recent[False].call, self._recent[True].call
        self._direct = None
        env.on_change(self._forget)
        replay.on_forget(self._forget)

    def _forget(self):
        with self._lock:
            self._changes += 1
            self._plans.clear()
        for kept in self._recent.values():
            kept.clear()
        self._direct = None

    def direct(self, tensor, like=None):
        """torch's composition, where a call on this CPU tensor would run it and no gradient is recorded; else None.

        `like` is a second tensor that the operator wants in the first one's dtype and shape, where torch would promote.
        For callers that have the arguments' shapes from the structure they are in, such as a patched model: the
        composition takes whatever torch takes, is seen by modes and transforms, and costs nothing to reach. The call
        is counted here. A fake tensor, such as `torch.export` traces with, has no values to look at.
        """
        if not tensor.is_cpu or torch.is_grad_enabled() or tensor.dtype not in FLOATS or dispatch.any_autocast():
            return None
        if type(tensor) is not torch.Tensor or invariance.enabled():
            return None
        if like is not None and (like.dtype is not tensor.dtype or like.shape != tensor.shape):
            return None
        if self._direct is None:
            self._direct = self._selector.entry("torch") if env.backend() in ("auto", "torch") else ()
        if not self._direct:
            return None
        function, count = self._direct
        count[0] += 1
        return function

    def _recall(self, given, first):
        """The result of a call, or the first of its results, where arguments like these were checked before; else None.

        "Like" is everything that checks and selection look at: types, dtypes, shapes, strides, devices, other values.
        """
        if watched() or dispatch.any_autocast():
            return None
        args = given if self._arguments is None else self._arguments(*given)
        try:
            signed = self._signature(*args)
            plan = self._plans.get(signed)
        except TypeError:  # an argument that cannot be hashed is for the checks to refuse
            return None
        if plan is None:
            return None
        device_index = plan.device_index
        if device_index is not None and device_index != torch.cuda.current_device():
            return None
        plan.count[0] += 1
        if plan.settled and self._recent[first].wants(first not in plan.known):
            function = plan.recognising(given, first, self._arguments)
            if function is not None:
                self._recent[first].keep(function, lambda: self._plans.get(signed) is plan)
        result = plan.run(*args)
        return result[0] if first else result

    def _plan(self, args, implementation, changes):
        if implementation == "reference" or (implementation == "torch" and invariance.enabled()):
            return  # rows are made by the reference together, and one by one by torch
        if env.validate() == 2:
            return  # each call's values are looked at
        if self._selector.leaves_fused_path(implementation, args[0]):
            return  # each such call needs a decision, or a warning, of its own
        if len(args) < self._signature.__code__.co_argcount:
            return  # torch leaves defaults out where it hands arguments on; a public function gives them all
        function, count = self._selector.entry(implementation)
        plan = _Plan(function, count, args[0].device.index, implementation == "triton")
        with self._lock:
            if changes != self._changes:  # another thread has changed what was selected
                return
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[self._signature(*args)] = plan

    def __call__(self, *args, out=None):
        if _dispatcher_needed(args):
            if out is None:
                return self._op(*args)
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, out)):
                raise RuntimeError(f"{self.name}: out must not be given where gradients are recorded, got out=")
            self._op_out(*args, out)
            return out
        changes = self._changes
        implementation, rejected = self._selector.select(args)
        if out is None and self._keeps_plans:
            self._plan(args, implementation, changes)
        return self._selector.run_selected(args, out, implementation, rejected)

    def select(self, args, limits=None):
        """The implementation that would run, and the rejected ones with their reasons."""
        return self._selector.select(args, limits)

    def launcher(self, kind="triton"):
        """The function that launches the operator's kernels, ``"triton"`` or ``"cuda"``."""
        return self._selector.entry(kind)[0]

    def kernel_kind(self, args):
        """Which kind of kernel would be emulated for a call, or None."""
        return self._selector.kernel_kind(args)

    def module(self, implementation, args=None):
        """The module of an implementation; of an emulated one that of the kernels that would take a call, if given."""
        return self._selector.module(implementation, args)


def _places(schema, names):
    """Places of arguments in a schema by their names."""
    arguments = schema.partition("(")[2].rpartition(") ->")[0].split(", ")
    found = [argument.partition("=")[0].split()[-1] for argument in arguments]
    return tuple(found.index(name) for name in names)


def watched():
    """Whether something wants to see every operator: tracing, modes, function transforms."""
    return _is_compiling() or _included_keys().raw_repr() & _UNUSUAL_KEYS != 0


def _dispatcher_needed(args):
    """Whether anything stands between the caller and the tensors: gradients, tracing, modes, subclasses."""
    if watched() or args[0].is_meta:
        return True
    grad = torch.is_grad_enabled()
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if type(arg) not in PLAIN or (grad and arg.requires_grad):
                return True
    return False


def register(schema, *, package, fake, implementations, backward=None, setup_context=None, out=False, cost=None,
             example=None, rows=(), arguments=None):
    """Register ``torch.ops.fusedops.<name>`` and return its Operator.

    Args:
        schema: Operator schema, ``"name(Tensor x, float eps) -> Tensor"``. The first argument is a tensor; the
            device of that tensor chooses the implementation.
        package: ``__name__`` of the operator's folder, where the implementations are found.
        fake: Function of the schema's arguments that allocates the outputs: shape, strides and dtype are the contract.
        implementations: Subset of ("cuda", "triton", "torch", "reference"), in the order to try on CUDA tensors. The
            module ``_<implementation>`` (``reference`` without underscore) of the package defines a function of the
            operator's name; its ``supports(*args)``, if any, returns the reason why it cannot run, or None.
        backward, setup_context: As in ``torch.library.register_autograd``. Without them, differentiating raises.
        out: Also register ``<name>_out``, which writes into a last argument ``out``.
        cost, example: See Operator.
        rows: Names of the arguments that have a row for each row of the first of them, which is ``[..., N]``: in
            batch-invariant mode torch's composition gets them row by row.
        arguments: Function of what `Operator.again` takes that gives the operator's arguments, where the public
            function has them in another form. A tensor must have the same place in both, and start at the same address.
    """
    operator = Operator(schema, package, implementations, fake, cost, example, rows, arguments)
    name = operator.name
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, operator._selector.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedops::{name}", fake, lib=_LIBRARY)
    if "!" not in schema:
        torch.library.register_autograd(
            f"fusedops::{name}", backward or _no_gradient(name), setup_context=setup_context, lib=_LIBRARY
        )
    operator._op = getattr(torch.ops.fusedops, name).default
    if out:
        arguments = schema.partition("(")[2].rpartition(") ->")[0]
        _LIBRARY.define(f"{name}_out({arguments}, Tensor(a!) out) -> ()", tags=_TAGS)
        _LIBRARY.impl(f"{name}_out", operator._selector.run_into, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedops::{name}_out", lambda *args: None, lib=_LIBRARY)
        operator._op_out = getattr(torch.ops.fusedops, f"{name}_out").default
    _OPERATORS[name] = operator
    return operator


def _no_gradient(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f"{name}: the result must not be differentiated, this operator has no derivative")

    return backward


def operators():
    """Every registered operator by name."""
    return dict(_OPERATORS)

"""What replaces what in a model: the list of replacements, made without touching the model."""

import functools
from dataclasses import dataclass, replace

from torch import nn

from fusedops.patch import rebuild, residual
from fusedops.patch.attention import AttentionState, Switch, find_attention, previous_name
from fusedops.patch.continuous import find_engine
from fusedops.patch.gates import GATE_METHOD, find_gate
from fusedops.patch.instance import State, foreign_forward
from fusedops.patch.linears import Fusion
from fusedops.patch.norms import find_norm
from fusedops.patch.probing import probing
from fusedops.patch.report import Row
from fusedops.patch.rotary import find_rotary

# kind -> function of a module that gives (State, text), the reason (str) why it is left alone, or None
FINDERS = {"norm": find_norm, "mlp": find_gate, "rotary": find_rotary, "attention": find_attention}


@dataclass
class Replacement:
    """One module to replace, its state, and the report's row."""

    module: nn.Module
    state: State
    row: Row


class Plan:
    """Replacements and report rows of one model.

    Args:
        model: Any module.
        kinds: Which of attention, norm, mlp, rotary, residual, linear to look for.
        strict: Raise where another patcher has set the forward of a module that we would replace.

    Raises:
        RuntimeError: another patcher was there, and `strict`.
    """

    def __init__(self, model, kinds, strict):
        self.model = model
        self.strict = strict
        self.replacements = []
        self.rows = []
        self._taken = {}
        self._switches = {}
        self.engines = []
        with probing():
            for path, module in model.named_modules():
                for kind, find in FINDERS.items():
                    found = find(module) if kind in kinds else None
                    if found is not None:
                        self.add(path, module, kind, found)
            if "linear" in kinds:
                Fusion(self).add_all()
        if "residual" in kinds:
            self._find_residuals()
        if self._switches:
            found = ((module, find_engine(module)) for module in model.modules())
            self.engines = [(module, state) for module, state in found if state is not None]

    def add(self, path, module, kind, found):
        """Take a finding into the plan, as a replacement or as a skipped row."""
        if isinstance(found, tuple):
            state, text = found
            reason = self.obstacle(path, module, state)
            if reason is None:
                row = Row(path, type(module).__name__, kind, "replaced", replacement=text)
                if isinstance(state, AttentionState):
                    state.switch = self._switch(module.config)
                else:
                    self._taken[module] = state
                self.replacements.append(Replacement(module, state, row))
                self.rows.append(row)
                return
        else:
            reason = found
        self.rows.append(Row(path, type(module).__name__, kind, "skipped", reason=reason))

    def reword(self, replacement, text):
        """Say otherwise what a module is replaced by."""
        row = replace(replacement.row, replacement=text)
        self.rows[self.rows.index(replacement.row)] = replacement.row = row

    def obstacle(self, path, module, state):
        """Why a module that we could replace is left alone, or None; chooses the slot."""
        if module in self._taken and not isinstance(state, AttentionState):
            return "the module is already replaced as another kind"
        if state.slot == GATE_METHOD:
            other = module.__dict__.get(GATE_METHOD)
        else:
            state.slot, other = foreign_forward(module)
        if other is None:
            return None
        reason = f"its {state.slot} was already replaced by {_origin(other)}"
        if self.strict:
            raise RuntimeError(
                f"patch: {path or 'the model'} must not be patched by something else ({reason}); "
                "undo that first, or pass strict=False to leave such modules alone"
            )
        return reason

    def _switch(self, config):
        """The one Switch of a config, which many modules read."""
        return self._switches.setdefault(id(config), Switch(config, previous_name(config)))

    def _find_residuals(self):
        rewritten = functools.cache(residual.rewritten_forward)
        clear = functools.cache(residual.loop_is_clear)
        for path, holder in self.model.named_modules():
            for name, layers in holder._modules.items():
                if isinstance(layers, nn.ModuleList | nn.Sequential) and len(layers):
                    prefix = f"{path}.{name}" if path else name
                    self._find_residuals_in(prefix, holder, name, list(layers), rewritten, clear)

    def _find_residuals_in(self, path, holder, list_name, layers, rewritten, clear):
        for index, layer in enumerate(layers):
            norms = self._norms_of(layer)
            if not norms:
                continue
            following = layers[index + 1] if index + 1 < len(layers) else None
            if following is None:
                last = self._norms_of(holder)[-1:]
                next_norm = holder._modules[last[0]] if last else None
                is_clear = bool(last) and clear(type(holder), list_name, last[0])
            else:
                entry = residual.entry_norm(following, self._norms_of(following))
                next_norm = following._modules[entry] if entry else None
                is_clear = clear(type(holder), list_name)
            try:
                forward, count = rewritten(type(layer), norms, next_norm is not None)
            except rebuild.CannotRebuildError as reason:
                found = str(reason)
            else:
                next_hooks = following._forward_pre_hooks if following is not None else {}
                state = residual.ResidualState(type(layer), norms, next_norm, is_clear, next_hooks, forward)
                found = state, f"{count} x residual addition and norm in one pass"
            self.add(f"{path}.{index}", layer, "residual", found)

    def _norms_of(self, module):
        """Names of a module's replaced norms, in their order."""
        replaced = {id(r.module) for r in self.replacements if r.row.kind == "norm"}
        return tuple(name for name, child in module._modules.items() if id(child) in replaced)


def _origin(value):
    function = getattr(value, "func", value)
    function = getattr(function, "__func__", function)
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}.{name}" if module and name else type(value).__name__

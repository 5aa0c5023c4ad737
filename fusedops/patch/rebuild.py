"""Building a function like an existing one: with a global replaced, or with a few expressions of its source replaced.

The original function, its module and its class stay as they are. Decorators are kept: a wrapper made by
`functools.wraps` is built again around the new function.
"""

import ast
import copy
import functools
import inspect
from types import CellType, CodeType, FunctionType


class CannotRebuildError(Exception):
    """A function is not made in a way that can be built again; the message says why."""


def innermost(function):
    """The function under all wrappers made by `functools.wraps`."""
    return inspect.unwrap(function)


def rewrap(function, change):
    """``change`` of the innermost function, inside wrappers like those around the original."""
    if not isinstance(function, FunctionType):
        raise CannotRebuildError(f"its forward is a {type(function).__name__}, not a function")
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return change(function)
    rebuilt = rewrap(inner, change)
    cells = function.__closure__ or ()
    if not any(_holds(cell, inner) for cell in cells):
        raise CannotRebuildError("its forward is wrapped in a way that cannot be repeated")
    closure = tuple(CellType(rebuilt) if _holds(cell, inner) else cell for cell in cells)
    wrapper = _like(function, function.__code__, function.__globals__, closure)
    wrapper.__wrapped__ = rebuilt
    return wrapper


def _holds(cell, value):
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _like(function, code, namespace, closure):
    alike = FunctionType(code, namespace, function.__name__, function.__defaults__, closure)
    alike.__kwdefaults__ = function.__kwdefaults__
    alike.__qualname__ = function.__qualname__
    alike.__module__ = function.__module__
    alike.__dict__.update(function.__dict__)
    return alike


def with_global(function, name, value):
    """The same code with one global replaced; the other globals are those of this moment."""
    return _like(function, function.__code__, {**function.__globals__, name: value}, function.__closure__)


def parse(function):
    """The syntax tree of a function's definition, a copy, without decorators and annotations.

    Raises:
        CannotRebuildError: there is no source, or it is not what the function was compiled from.
    """
    code = getattr(function, "__code__", None)
    try:
        definitions, codes = _read("".join(inspect.findsource(function)[0]))
    except (OSError, TypeError, SyntaxError) as error:
        raise CannotRebuildError(f"the source of its forward cannot be read ({error})") from error
    place = code.co_name, code.co_firstlineno
    if codes.get(place) != code or place not in definitions:
        raise CannotRebuildError("the source of its forward is not the code that runs")
    definition = copy.deepcopy(definitions[place])
    definition.decorator_list = []
    definition.returns = None
    for argument in ast.walk(definition.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return definition


@functools.lru_cache(maxsize=8)
def _read(text):
    """Function definitions and code objects of a file, by name and first line.

    The whole file is compiled because the code of a function depends a little on what the file imports.
    """
    tree = ast.parse(text)
    definitions, codes = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            definitions[node.name, first] = node
    found = [compile(tree, "<source>", "exec", dont_inherit=True)]
    while found:
        code = found.pop()
        codes[code.co_name, code.co_firstlineno] = code
        found += [const for const in code.co_consts if isinstance(const, CodeType)]
    return definitions, codes


def compiled(function, definition, names):
    """A function like the given one from a changed tree; `names` are extra values that the tree may use."""
    code = _compile(function, definition, names)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells.update((name, CellType(value)) for name, value in names.items())
    return _like(function, code, function.__globals__, tuple(cells[name] for name in code.co_freevars))


def _compile(function, definition, names):
    """The code object, with the function's own free variables and the extra names as free variables."""
    free = [ast.arg(name) for name in (*function.__code__.co_freevars, *names)]
    arguments = ast.arguments(posonlyargs=[], args=free, kwonlyargs=[], kw_defaults=[], defaults=[])
    outer = ast.FunctionDef(name="build", args=arguments, body=[definition], decorator_list=[])
    # one definition, kept out of a class body, so that its names mean what they mean in the original
    tree = ast.fix_missing_locations(ast.Module([outer], type_ignores=[]))
    module = compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)
    return _nested(_nested(module, "build"), definition.name)


def _nested(code, name):
    return next(const for const in code.co_consts if isinstance(const, CodeType) and const.co_name == name)

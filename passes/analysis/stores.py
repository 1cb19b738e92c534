"""The names of what code beside a graph may change, so that no graph reads them once for all."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import nn

from tdfx.layers.module_state import HOOKS
from tdfx.passes.analysis.safe_calls import MUTATING_METHODS, PURE_METHODS, refusal_of_callable, tensor_methods
from tdfx.passes.analysis.scope import UNKNOWN, Scope, last_name
from tdfx.passes.analysis.source import definition_of, is_users_file
from tdfx.passes.analysis.user_state import UserState

_BUILDING = {"__init__", "__post_init__", "__setstate__", "reset_parameters"}
"""Methods by which an object builds or restores itself; what they change of others counts."""
_NOT_IN_FORWARD = {"train", "eval", "load_state_dict"}
_MODES = {"train", "eval"}
"""Methods that switch modes, which graphs follow by other means."""
_RUNNING = {"forward", "<lambda>"}
"""Names of functions that run without being named in other code; so do methods such as ``__enter__``."""


def stored_by_block(block: nn.Module) -> frozenset[str]:
    """Return the names of all attributes and globals that calls of a block may change, hooks included."""
    state = UserState(block)
    return _stored(block, state.functions, leave=_NOT_IN_FORWARD)


def stored_by_hooks(root: nn.Module) -> frozenset[str]:
    """Return the names of what hooks change, and what a user's own ``train`` changes, anywhere in a model."""
    hooks = [hook for module in root.modules() for name in HOOKS for hook in _values(module.__dict__[name])]
    kinds = {type(module) for module in root.modules()}
    switches = [each for kind in kinds for name in _MODES if (each := _own_method(kind, name)) is not None]
    switches += [called for kind in kinds for each in switches for called in _called_methods(kind, each)]
    functions = UserState(nn.Module(), *hooks, *switches).functions if hooks or switches else []
    return _stored(root, functions) - {"training"}


def _values(hooks: Any) -> Iterable[Any]:
    return hooks.values() if isinstance(hooks, dict) else ()


def _own_method(kind: type, name: str) -> types.FunctionType | None:
    method = inspect.getattr_static(kind, name, None)
    is_own = isinstance(method, types.FunctionType) and is_users_file(method.__code__.co_filename)
    return method if is_own else None


def _called_methods(kind: type, function: types.FunctionType) -> Iterator[types.FunctionType]:
    names = set(function.__code__.co_names) - _MODES - {function.__name__}
    return (method for name in names if (method := _own_method(kind, name)) is not None)


def _stored(
    module: nn.Module, functions: list[tuple[str, types.FunctionType]], leave: Iterable[str] = ()
) -> frozenset[str]:
    reached = [each for each in _reached(functions) if each.__name__ not in leave]
    results = [_stored_in(function) for function in reached if is_users_file(function.__code__.co_filename)]
    names = frozenset().union(*(result[0] for result in results))
    if any(result[2] for result in results):  # what one function is given, another has passed
        # A module stays what it is; what is changed of it has a name of its own.
        modules = {path.rpartition(".")[2] for path, _ in module.named_modules()}
        names |= frozenset().union(*(result[1] for result in results)) - modules
    return names


def _reached(functions: list[tuple[str, types.FunctionType]]) -> list[types.FunctionType]:
    """Return the functions that run, as far as the names in the code of those that run tell."""
    reached: dict[types.FunctionType, None] = {}
    named: set[str] = set()
    while True:
        before = len(reached)
        for name, function in functions:
            own = {name, function.__name__}
            runs = not name or function.__name__.startswith("__") or own & (_RUNNING | named)
            if function not in reached and runs:
                reached[function] = None
                named |= set(_names(function.__code__))
        if len(reached) == before:
            return list(reached)


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield all names and texts in the code of a function: an attribute may be read by a text."""
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names(constant)


@lru_cache(maxsize=4096)
def _stored_in(function: types.FunctionType) -> tuple[frozenset[str], frozenset[str], bool]:
    """Return the names that a function changes, those that it passes to others, and whether it changes an argument."""
    definition = definition_of(function.__code__)
    if definition is None:
        return frozenset(), frozenset(), False
    scope = Scope(definition, {}, function.__globals__)
    builds = scope.definition.args.args[0].arg if function.__name__ in _BUILDING and scope.definition.args.args else ""
    stored: set[str] = set()
    passed: set[str] = set()
    changes_argument = False
    for node in scope.all_nodes():
        match node:
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                stored |= set(names)
            case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[_, ast.Constant(value=str() as name), *_]):
                stored.add(name)
            case ast.Call(args=arguments) if not _is_pure(node, scope):
                given = {name for argument in arguments for name in _names_in(argument, scope)}
                passed |= given
                stored |= given if _is_of_library(node, scope) else set()
        for target in _changed_by(node):
            if _root_of(target) != builds or not builds:
                stored |= set(_names_in(target, scope))
                changes_argument |= not isinstance(target, ast.Attribute) and _may_be_argument(target, scope)
    return frozenset(stored), frozenset(passed), changes_argument


def _changed_by(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions for what a statement or a call changes."""
    match node:
        case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
            yield node
        case ast.AugAssign(target=ast.Name() as target):
            yield target
        case ast.Call(func=ast.Attribute(value=owner, attr=method)) if _may_change(method):
            yield owner


def _may_change(method: str) -> bool:
    is_pure = method in tensor_methods() or method in PURE_METHODS or method in {"forward", *_MODES}
    return method in MUTATING_METHODS or not is_pure


def _is_of_library(call: ast.Call, scope: Scope) -> bool:
    """Return True for a function that no source tells about, such as ``heapq.heappush``."""
    function = scope.value_of(call.func)
    code = getattr(function, "__code__", None)
    return function is not UNKNOWN and not isinstance(function, type) and not (code and is_users_file(code.co_filename))


def _is_pure(call: ast.Call, scope: Scope) -> bool:
    function = scope.value_of(call.func)
    is_users = isinstance(function, types.FunctionType) and is_users_file(function.__code__.co_filename)
    if function is not UNKNOWN:
        return not is_users and not refusal_of_callable(function)
    return isinstance(call.func, ast.Attribute) and not _may_change(call.func.attr)


def _names_in(node: ast.AST, scope: Scope, seen: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the names of attributes and of globals in an expression, and in what its variables are bound to."""
    called = {id(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
    for part in ast.walk(node):
        if _is_from_library(scope.value_of(part)):
            continue
        if isinstance(part, ast.Attribute):
            if id(part) not in called or part.attr not in tensor_methods():
                yield part.attr
        elif isinstance(part, ast.Name) and part.id in scope.bindings and part.id not in seen:
            for value in scope.bindings[part.id]:
                if _may_be_alias(value):
                    yield from _names_in(value, scope, seen | {part.id})
        elif isinstance(part, ast.Name) and part.id not in scope.arguments | scope.bindings.keys():
            yield part.id


def _is_from_library(value: Any) -> bool:
    """Return True for a module, class or function that is not the user's."""
    if not isinstance(value, types.ModuleType | type | types.FunctionType | types.BuiltinFunctionType):
        return False
    module = value if isinstance(value, types.ModuleType) else inspect.getmodule(value)
    file = getattr(module, "__file__", None)
    return not is_users_file(file) if file else getattr(module, "__name__", "") in sys.stdlib_module_names


def _may_be_alias(value: ast.AST) -> bool:
    """Return False for an expression that makes a new value."""
    if isinstance(value, ast.Starred):
        return _may_be_alias(value.value)
    if isinstance(value, ast.Call):
        return last_name(value.func) in PURE_METHODS | MUTATING_METHODS | {
            "getattr",
            "vars",
            "iter",
            "enumerate",
            "zip",
        }
    return isinstance(value, ast.Name | ast.Attribute | ast.Subscript | ast.IfExp | ast.BoolOp | ast.NamedExpr)


def _root_of(target: ast.AST) -> str:
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
    return target.id if isinstance(target, ast.Name) else ""


def _may_be_argument(target: ast.AST, scope: Scope, seen: frozenset[str] = frozenset()) -> bool:
    """Return True for an argument, or an item of one, by whatever name."""
    while isinstance(target, ast.Subscript | ast.Starred):
        target = target.value
    if not isinstance(target, ast.Name) or target.id in seen:
        return False
    values = scope.bindings.get(target.id, ())
    return target.id in scope.arguments or any(_may_be_argument(value, scope, seen | {target.id}) for value in values)

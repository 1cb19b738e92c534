"""What the names and expressions of a function stand for, as far as its code tells."""

from __future__ import annotations

import ast
import builtins
import inspect
import types
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_any

from tdfx.passes.analysis.safe_calls import CONTAINERS
from tdfx.passes.analysis.source import Definition

UNKNOWN: Any = object()
"""The value of an expression that cannot be told without running it."""
FRESH = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
"""Expressions that make a new container."""
_FRESH_CALLS = {"list", "dict", "set", "OrderedDict"}
_SCOPES = (ast.FunctionDef, ast.Lambda)


def is_proxy(value: Any) -> bool:
    """Return True for what a trace has in the place of data."""
    return isinstance(value, fx.Proxy)


class Scope:
    """The code of one call of a function, its arguments, and the names that it sees."""

    def __init__(self, definition: Definition, names: Mapping[str, Any], global_names: Mapping[str, Any]) -> None:
        self.definition = definition
        self.names = dict(names)
        """Arguments and names of outer functions -> their values."""
        self.globals = global_names
        self.body = definition.body if isinstance(definition.body, list) else [definition.body]
        self.arguments = {node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg)}
        self.bindings: dict[str, list[ast.AST]] = {}
        self.nodes = [node for part in self.body for node in self._walk(part)]
        self.bindings = _bindings(self.nodes)
        """Names that the function binds -> the expressions that they are bound to."""

    def all_nodes(self) -> list[ast.AST]:
        """Return all of its code, that of functions inside it included."""
        return [node for part in self.body for node in ast.walk(part)]

    def _walk(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield a function's own code, but what is for TorchScript; functions inside it are read when they run."""
        yield node
        if isinstance(node, _SCOPES):
            return
        is_for_script = isinstance(node, ast.If) and self._is_of_script(node.test)
        for child in node.orelse if is_for_script else ast.iter_child_nodes(node):  # type: ignore[attr-defined]
            yield from self._walk(child)

    def _is_of_script(self, test: ast.expr) -> bool:
        """Return True for a test that only TorchScript passes."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return any(map(self._is_of_script, test.values))
        return isinstance(test, ast.Call) and self.value_of(test.func) is torch.jit.is_scripting  # type: ignore[attr-defined]

    def value_of(self, node: ast.AST) -> Any:
        """Return what an expression stands for, as far as that can be told without running anything."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in self.bindings:
                values = self.bindings[name]
                is_alias = len(values) == 1 and isinstance(values[0], ast.Attribute) and name not in self.names
                return self.value_of(values[0]) if is_alias else UNKNOWN
            case ast.Name(id=name) if name in self.names:
                return UNKNOWN if tree_any(is_proxy, self.names[name]) else self.names[name]
            case ast.Name(id=name) if name in self.arguments:
                return UNKNOWN
            case ast.Name(id=name):
                return self.globals.get(name, getattr(builtins, name, UNKNOWN))
            case ast.Attribute(value=base, attr=name):
                owner = self.value_of(base)
                return UNKNOWN if owner is UNKNOWN else _member(owner, name)
            case ast.Subscript(value=base, slice=key):
                owner, index = self.value_of(base), self.value_of(key)
                return UNKNOWN if UNKNOWN in (owner, index) else _item(owner, index)
        return UNKNOWN


def _bindings(nodes: list[ast.AST]) -> dict[str, list[ast.AST]]:
    """Return for each name that a function binds the expressions that it is bound to."""
    bindings: defaultdict[str, list[ast.AST]] = defaultdict(list)

    def bind(target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name):
            bindings[target.id].append(value)
        elif isinstance(target, ast.Tuple | ast.List | ast.Starred):
            parts = list(ast.iter_child_nodes(target))
            values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) + 1 == len(parts) else None
            for index, part in enumerate(parts[:-1]):  # the last is the context
                bind(part, values[index] if values is not None else _item_of(value))

    for node in nodes:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    bind(target, value)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                bind(target, value)
            case ast.AugAssign(target=target, op=operator, value=value):
                bind(target, value if makes_container(value) else ast.BinOp(target, operator, value))
            case ast.For(target=target, iter=values) | ast.comprehension(target=target, iter=values):
                bind(target, _item_of(values))
            case ast.NamedExpr(target=target, value=value):
                bind(target, value)
            case ast.FunctionDef(name=name):
                bindings[name].append(ast.Lambda())  # type: ignore[call-arg]
    return dict(bindings)


def _item_of(whole: ast.AST) -> ast.AST:
    """Return an expression for an item of a value, of which nothing is known but whether it is data."""
    return ast.Starred(
        value=whole,  # type: ignore[arg-type]
        ctx=ast.Load(),
    )


def makes_container(node: ast.AST) -> bool:
    """Return True for an expression that makes a new container."""
    return isinstance(node, FRESH) or (isinstance(node, ast.Call) and last_name(node.func) in _FRESH_CALLS)


def last_name(node: ast.AST) -> str:
    """Return the name of a variable or an attribute, or an empty text for any other expression."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _member(owner: Any, name: str) -> Any:
    """Return an attribute of an object without running any code of its class."""
    own: Mapping[str, Any] = getattr(owner, "__dict__", {})
    if isinstance(owner, types.ModuleType):
        return own.get(name, UNKNOWN)
    if isinstance(owner, nn.Module):
        for held in (own, own["_modules"], own["_parameters"], own["_buffers"]):
            if name in held:
                return held[name]
    if isinstance(owner, Tensor) or is_proxy(owner):
        return UNKNOWN
    value = inspect.getattr_static(owner, name, UNKNOWN)
    if isinstance(value, staticmethod):
        return value.__func__
    if isinstance(value, classmethod):
        return types.MethodType(value.__func__, owner if isinstance(owner, type) else type(owner))
    if isinstance(value, property | types.GetSetDescriptorType | types.MemberDescriptorType):
        return UNKNOWN
    if isinstance(owner, type) or name in own:
        return value
    if isinstance(value, types.FunctionType):
        return types.MethodType(value, owner)
    if hasattr(type(value), "__get__"):  # a method of a class that is written in C
        read: Any = type(owner).__getattribute__
        is_plain = type(owner) in CONTAINERS or read is object.__getattribute__
        return getattr(owner, name, UNKNOWN) if is_plain else value
    return value


def _item(owner: Any, index: Any) -> Any:
    if isinstance(owner, nn.ModuleDict):
        owner = owner._modules
    elif isinstance(owner, nn.ModuleList | nn.Sequential):
        owner = list(owner._modules.values())
    try:
        return owner[index] if type(owner) in {dict, list, tuple} else UNKNOWN
    except (LookupError, TypeError):
        return UNKNOWN

"""Whether a graph repeats what a function does: its code is read, and only what is known to be safe is let through.

Values are of two kinds. *Configuration* is what a trace computes for good: constants, attributes, and what pure functions
make of them. All else is *data*: what flows through the model, in whose place a trace has proxies. A graph records what is
computed with data, and nothing that merely looks at them. Nothing may be changed but data, and containers that the function
made itself (*fresh* ones).
"""

from __future__ import annotations

import ast
import builtins
import os
from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_any

from tdfx.passes.analysis.modes import Mode
from tdfx.passes.analysis.safe_calls import (
    LOOKING,
    MUTATING_METHODS,
    PURE_METHODS,
    is_of_torch,
    refusal_of_callable,
    tensor_methods,
)
from tdfx.passes.analysis.scope import FRESH, UNKNOWN, Scope, is_proxy, last_name, makes_container
from tdfx.passes.analysis.source import Definition

_STATEMENTS: dict[type[ast.AST], str] = {
    ast.Try: "uses try",
    ast.With: "enters a context by with",
    ast.AsyncWith: "enters a context by with",
    ast.Global: "assigns to global names",
    ast.Nonlocal: "assigns to names of an outer function",
    ast.Import: "imports",
    ast.ImportFrom: "imports",
    ast.Match: "uses match",
    ast.ClassDef: "defines a class",
    ast.Yield: "yields",
    ast.YieldFrom: "yields",
    ast.Await: "awaits",
    ast.AsyncFor: "awaits",
    ast.AsyncFunctionDef: "awaits",
    **({ast.TryStar: "uses try"} if hasattr(ast, "TryStar") else {}),
}
"""Statements and expressions that are refused wherever they stand."""
ANY_ATTRIBUTE = "*"
"""Stands for the attributes that code reads by names that it computes."""
_NUMBERS = {"len", "int", "float", "sum", "max", "min", "abs", "round"}


class UnsafeConstructError(Exception):
    """A function does what a graph would not repeat."""

    def __init__(self, what: str, node: ast.AST) -> None:
        super().__init__(what)
        self.line = getattr(node, "lineno", 0)


class SafeCode(Scope):
    """Checks one call of a function: whether a graph repeats all that its code does."""

    def __init__(self, definition: Definition, names: Mapping[str, Any], global_names: Mapping[str, Any]) -> None:
        super().__init__(definition, names, global_names)
        self.data = {name for name, value in self.names.items() if tree_any(is_proxy, value)}
        """The names that hold data."""
        self._spread_data()
        self.attributes: set[str] = set()
        """The names of the attributes that it reads, and of what it reads of its file."""
        self.fresh_lines: set[int] = set()
        """The lines in which it changes containers of its own."""

    def check(self) -> None:
        """Raise UnsafeConstructError at the first construct that a graph would not repeat."""
        for node in self.nodes:
            if what := _STATEMENTS.get(type(node)):
                raise UnsafeConstructError(what, node)
            check = getattr(self, f"_check_{type(node).__name__.lower()}", None)
            if check is not None and (what := check(node)):
                raise UnsafeConstructError(what, node)

    def _spread_data(self) -> None:
        """Mark the names that are bound to data, until no more are."""
        while True:
            found = {
                name
                for name, values in self.bindings.items()
                if name not in self.data and not all(map(self._is_config, values))
            }
            if not found:
                return
            self.data |= found

    # What is stored

    def _check_assign(self, node: ast.Assign) -> str:
        return next(filter(None, map(self._refusal_of_target, node.targets)), "")

    def _check_annassign(self, node: ast.AnnAssign) -> str:
        return self._refusal_of_target(node.target)

    def _check_for(self, node: ast.For) -> str:
        return self._refusal_of_target(node.target)

    def _check_comprehension(self, node: ast.comprehension) -> str:
        return "awaits" if node.is_async else self._refusal_of_target(node.target)

    def _check_delete(self, node: ast.Delete) -> str:
        return next(filter(None, map(self._refusal_of_target, node.targets)), "")

    def _check_augassign(self, node: ast.AugAssign) -> str:
        if not isinstance(node.target, ast.Name):
            return self._refusal_of_target(node.target)
        name = node.target.id
        argument = self.names.get(name, 0)
        if not is_proxy(argument) and not isinstance(argument, bool | int | float | str | tuple):
            return f"changes its argument {name!r} in place"
        for value in self.bindings[name]:
            is_number = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _NUMBERS
            is_new = is_number or isinstance(value, (ast.Constant, ast.BinOp, ast.UnaryOp, *FRESH))
            if self._is_config(value) and not is_new:
                return f"may change in place what {name!r} stands for"
        return ""

    def _refusal_of_target(self, target: ast.expr) -> str:
        match target:
            case ast.Name():
                return ""
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return next(filter(None, map(self._refusal_of_target, parts)), "")
            case ast.Starred(value=value):
                return self._refusal_of_target(value)
            case ast.Attribute():
                return f"assigns to an attribute, {ast.unparse(target)}"
            case ast.Subscript(value=ast.Name(id=name)) if self._is_fresh(name):
                self.fresh_lines.add(target.lineno)
                return self._refusal_of_key(target.slice)
        return f"assigns to an item, {ast.unparse(target)}"

    def _is_fresh(self, name: str) -> bool:
        """Return True for a name that only ever stands for a container which this call of the function made."""
        values = self.bindings.get(name, ())
        return name not in self.names and bool(values) and all(map(makes_container, values))

    # What is looked at

    def _check_compare(self, node: ast.Compare) -> str:
        operands = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
            if isinstance(operator, ast.Is | ast.IsNot) and not (self._can_be_looked_at(left, right)):
                return f"asks whether {ast.unparse(node)}"
            if isinstance(operator, ast.In | ast.NotIn) and not self._can_be_looked_at(left):
                return f"asks whether {ast.unparse(node)}"
        return ""

    def _check_joinedstr(self, node: ast.JoinedStr) -> str:
        return "" if self._is_config(node) or node in self._messages() else "makes a text of what flows through it"

    def _check_binop(self, node: ast.BinOp) -> str:
        is_text = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
        return "makes a text of what flows through it" if is_text and not self._is_config(node.right) else ""

    def _check_dict(self, node: ast.Dict) -> str:
        return next(filter(None, (self._refusal_of_key(key) for key in node.keys if key is not None)), "")

    def _check_dictcomp(self, node: ast.DictComp) -> str:
        return self._refusal_of_key(node.key)

    def _check_set(self, node: ast.Set) -> str:
        return next(filter(None, map(self._refusal_of_key, node.elts)), "")

    def _check_setcomp(self, node: ast.SetComp) -> str:
        return self._refusal_of_key(node.elt)

    def _refusal_of_key(self, key: ast.expr) -> str:
        if isinstance(key, ast.Slice) or self._is_config(key):
            return ""
        return f"uses what flows through it as a key, {ast.unparse(key)}"

    def _check_name(self, node: ast.Name) -> str:
        if node.id not in self.arguments and node.id not in self.bindings:
            self.attributes.add(node.id)
        return f"reads {node.id}" if self.value_of(node) is os.environ else ""

    def _check_attribute(self, node: ast.Attribute) -> str:
        self.attributes.add(node.attr)
        if node.attr in {"grad", "grad_fn", "_buffers", "_parameters"} or self.value_of(node) is os.environ:
            return f"reads {ast.unparse(node)}"
        is_private = node.attr.startswith("__") or node.attr in {"node", "tracer"}
        return f"reads {ast.unparse(node)}" if is_private and not self._is_config(node.value) else ""

    def _messages(self) -> set[ast.AST]:
        """Return all that stands in the messages of errors, which nobody reads unless there is one."""
        errors = [node for node in self.nodes if isinstance(node, ast.Raise | ast.Assert)]
        parts: list[ast.AST | None] = [node.msg if isinstance(node, ast.Assert) else node for node in errors]
        calls = (node for node in self.nodes if isinstance(node, ast.Call) and last_name(node.func) == "_assert")
        parts += [argument for call in calls for argument in call.args[1:]]
        return {node for part in parts if part is not None for node in ast.walk(part)}

    # What is called

    def _check_call(self, node: ast.Call) -> str:
        if node in self._messages():
            return ""
        function = self.value_of(node.func)
        name = last_name(node.func)
        if function is not UNKNOWN:
            if getattr(builtins, name, None) is function and name in LOOKING:
                return self._refusal_of_looking(node, name)
            if refusal := refusal_of_callable(function):
                return refusal
            has_owner = isinstance(getattr(function, "__self__", None), dict | list | tuple | set | frozenset | str)
            if has_owner and not all(map(self._is_config, node.args)):
                return f"looks up what flows through it, {ast.unparse(node)}"
            return ""
        if isinstance(node.func, ast.Attribute):
            return self._refusal_of_method(node, node.func)
        if isinstance(node.func, ast.Name | ast.Subscript | ast.Call | ast.Lambda | ast.IfExp):
            return ""  # what it turns out to be is read, or refused, when it is called
        return f"calls {ast.unparse(node.func)}"

    def _refusal_of_looking(self, node: ast.Call, name: str) -> str:
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if name == "getattr" and len(arguments) == 2:
            name = self.value_of(arguments[1])
            self.attributes.add(name if isinstance(name, str) else ANY_ATTRIBUTE)
            return "" if self._is_config(arguments[1]) else "reads an attribute whose name flows through it"
        if name == "isinstance" and self._holds_container(arguments[0]):
            return ""
        if all(map(self._can_be_looked_at, arguments)):
            return ""
        return f"asks for {ast.unparse(node)}"

    def _refusal_of_method(self, node: ast.Call, function: ast.Attribute) -> str:
        name, owner = function.attr, function.value
        if isinstance(owner, ast.Name) and self._is_fresh(owner.id):
            self.fresh_lines.add(node.lineno)
            keys = node.args[:1] if name in {"add", "setdefault", "pop", "get"} else []
            return next(filter(None, map(self._refusal_of_key, keys)), "")
        if name in {"format", "format_map"} and not self._is_config(node) and node not in self._messages():
            return "makes a text of what flows through it"
        if isinstance(owner, ast.Call) and last_name(owner.func) == "super":
            return ""  # it is read when it runs
        is_known = name in tensor_methods() or name in PURE_METHODS or name in {"forward", "named_children", "children"}
        if not is_known or (name in MUTATING_METHODS and self._is_config(owner)):
            return f"calls {ast.unparse(function)}(), which may change something"
        return ""

    # What an expression is

    def _is_config(self, node: ast.AST) -> bool:
        match node:
            case (
                ast.Constant()
                | ast.expr_context()
                | ast.Lambda()
                | ast.operator()
                | ast.unaryop()
                | ast.boolop()
                | ast.cmpop()
            ):
                return True
            case ast.Name(id=name):
                return name not in self.data
            case ast.Attribute(value=value):
                return self._is_config(value)
            case ast.Call(func=function, args=arguments, keywords=keywords):
                values = [*arguments, *(keyword.value for keyword in keywords)]
                return self._computes_config(function) and all(map(self._is_config, values))
            case ast.Starred() | ast.keyword() | ast.comprehension() | ast.expr():
                return all(map(self._is_config, ast.iter_child_nodes(node)))
        return False

    def _computes_config(self, function: ast.expr) -> bool:
        """Return True for a function that makes configuration of configuration."""
        value = self.value_of(function)
        of_module = isinstance(function, ast.Attribute) and isinstance(self.value_of(function.value), nn.Module)
        if value is not UNKNOWN and not (of_module and is_of_torch(getattr(value, "__func__", value))):
            return isinstance(value, type) or getattr(builtins, getattr(value, "__name__", ""), None) is value
        is_listing = isinstance(function, ast.Attribute) and function.attr in PURE_METHODS | {
            "children",
            "named_children",
        }
        return is_listing and self._is_config(function.value)  # type: ignore[attr-defined]

    def _can_be_looked_at(self, *nodes: ast.expr) -> bool:
        """Return True for configuration that is itself in a trace: no flag of a mode, and no tensor."""
        return all(self._is_config(node) and not self._may_be_mode(node) for node in nodes)

    def _may_be_mode(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        for part in ast.walk(node):
            name = last_name(part)
            if name == "training" or isinstance(self.names.get(name), Mode):
                return True
            values = self.bindings.get(name, ()) if isinstance(part, ast.Name) and name not in seen else ()
            if any(self._may_be_mode(value, seen | {name}) for value in values):
                return True
        return False

    def _holds_container(self, node: ast.expr) -> bool:
        """Return True for an argument that is a container itself, so that its class can be asked for."""
        if not isinstance(node, ast.Name) or node.id in self.bindings:
            return False
        return not is_proxy(self.names.get(node.id, fx.Proxy))

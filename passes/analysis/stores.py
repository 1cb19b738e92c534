"""The names of what the code of a block changes, so that no graph around it reads them once for all."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn

from tdfx.passes.analysis.safe_calls import MUTATING_METHODS, PURE_METHODS, tensor_methods
from tdfx.passes.analysis.source import definition_of, is_users_file

_NOT_IN_FORWARD = {"__init__", "reset_parameters", "__setstate__", "train", "eval", "load_state_dict"}
"""Methods by which a class builds, restores or switches its modules; the mode is followed by other means."""


def stored_names(module: nn.Module) -> frozenset[str]:
    """Return the names of all attributes that the code of a module and of those inside it may change."""
    kinds: list[Any] = [type(part) for part in module.modules()]
    return frozenset().union(*map(_stored_by, kinds))


@lru_cache(maxsize=1024)
def _stored_by(kind: type) -> frozenset[str]:
    functions = (value for base in kind.__mro__ for name, value in vars(base).items() if name not in _NOT_IN_FORWARD)
    codes = (function.__code__ for function in functions if isinstance(function, types.FunctionType))
    definitions = (definition_of(code) for code in codes if is_users_file(code.co_filename))
    return frozenset(name for definition in definitions if definition is not None for name in _stored_in(definition))


def _stored_in(definition: ast.AST) -> Iterator[str]:
    for node in ast.walk(definition):
        match node:
            case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
                yield from _names_in(node)
            case ast.Call(func=ast.Attribute(value=owner, attr=method)) if _may_change(method):
                yield from _names_in(owner)
            case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str() as name), *_]):
                yield name


def _may_change(method: str) -> bool:
    is_pure = method in tensor_methods() or method in PURE_METHODS or method == "forward"
    return method in MUTATING_METHODS or not is_pure


def _names_in(node: ast.AST) -> Iterator[str]:
    return (part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute))

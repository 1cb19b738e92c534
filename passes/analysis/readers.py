"""Code that reads parameters beside the calls of their layers, found in the source where no graph shows what it does."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from tdfx.kinds.attention import is_transformer_block
from tdfx.kinds.registry import is_candidate, kind_of
from tdfx.passes.analysis.scope import UNKNOWN, Scope, last_name
from tdfx.passes.analysis.source import definition_of, is_users_file
from tdfx.passes.analysis.tracer import is_site_or_leaf
from tdfx.passes.analysis.uses import METADATA
from tdfx.passes.program import Program

_LISTING = {"parameters", "named_parameters", "state_dict", "_parameters", "get_parameter", "parameters_to_vector"} | {
    "modules",
    "named_modules",
}
_ASKING = {"isinstance", "type"}
_WEIGHTS = {"weight"}
_WRITTEN = "written"
"""Stands for an assignment in place to a weight, or to an attribute that its layer computes with."""
_WRITING = {"load_state_dict", "reset_parameters"}
"""Methods of a layer that write to its weight."""

MAY_READ = "may read its weight besides calling it; example_inputs would tell"


def read_weights(program: Program) -> tuple[dict[int, str], dict[int, str]]:
    """Return the parameters that a forward reads, or may read, where no graph shows it: parameter, by identity -> why.

    The first are those of modules whose parameters are listed, as by ``self.parameters()``, and of layers whose class is
    asked for, because factors have another class; the second are weights that are read by name, of which a run with example
    inputs tells whether that is a call of a function that a site may be.
    """
    proven = {
        id(module)
        for path, traced in program.graphs.items()
        if not traced.mismatch
        for module in _shown(program.module.get_submodule(path), list(traced.opaque))
    }
    listed: dict[int, str] = {}
    named: dict[int, str] = {}
    own = set(map(id, program.module.modules()))
    for module in program.module.modules():
        is_proven = id(module) in proven
        if is_site_or_leaf(module) or is_transformer_block(module) or (is_proven and program.emit == "graph"):
            continue
        for owner, attribute in _reads(module):
            why = f"forward of {type(module).__name__} "
            if attribute == "__call__":
                if id(owner) not in own:  # a rewrite does not change what another object holds
                    listed |= dict.fromkeys(map(id, owner.parameters()), f"{why}calls it through an object of its own")
            elif attribute == "requires_grad_" and is_candidate(owner):
                listed |= dict.fromkeys(map(id, owner.parameters(recurse=False)), f"{why}freezes or trains its weight")
            elif attribute == _WRITTEN and is_candidate(owner):
                listed |= dict.fromkeys(map(id, owner.parameters(recurse=False)), f"{why}changes its layer or weight")
            elif attribute == "__class__" and is_candidate(owner):
                listed |= dict.fromkeys(map(id, owner.parameters(recurse=False)), f"{why}asks for its class")
            elif is_proven:
                continue
            elif attribute in _LISTING:
                listed |= dict.fromkeys(map(id, owner.parameters()), f"{why}goes through parameters")
            elif is_candidate(owner) and kind_of(owner).weight == attribute:
                named |= dict.fromkeys(map(id, owner.parameters(recurse=False)), f"{why}{MAY_READ}")
    return listed, named


def _shown(root: nn.Module, opaque: list[str]) -> Iterator[nn.Module]:
    """Yield the modules whose forwards a graph has recorded."""
    for path, module in root.named_modules():
        if not any(path == each or path.startswith(f"{each}.") for each in opaque):
            yield module


def _reads(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules whose parameters the code of a module's forward reads, and by which attribute."""
    seen: set[types.CodeType] = set()
    waiting: list[tuple[Any, Any]] = [(module.forward, module)]
    while waiting:
        function, owner = waiting.pop()
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not isinstance(function, types.FunctionType):
            continue
        code = function.__code__
        if code in seen or not is_users_file(code.co_filename):
            continue
        seen.add(code)
        if (definition := definition_of(code)) is None:
            continue
        arguments = {code.co_varnames[0]: owner} if owner is not None and code.co_argcount else {}
        scope = Scope(definition, arguments | _closure(function), function.__globals__)
        parents = {id(child): node for node in scope.all_nodes() for child in ast.iter_child_nodes(node)}
        for node in scope.all_nodes():
            match node:
                case ast.Attribute(value=value, attr=name) if not _is_metadata(node, parents):
                    owned = scope.value_of(value)
                    if owned is UNKNOWN and name in _WEIGHTS:
                        # Whose weight it is, only a run tells.
                        yield from ((layer, name) for layer in module.modules() if is_candidate(layer))
                    if name in _LISTING and not _is_first(node, parents) and not _is_signature(value, scope):
                        yield (owned if isinstance(owned, nn.Module) else module), name
                    elif isinstance(owned, nn.Module):
                        yield owned, _change_of(node, parents, owned) or name
                case ast.Name(id="parameters_to_vector"):
                    yield module, "parameters_to_vector"
                case ast.MatchClass(cls=kind) | ast.Call(func=ast.Name(id="isinstance"), args=[_, kind]):
                    kinds = scope.value_of(kind)
                    if isinstance(node, ast.MatchClass) or scope.value_of(node.args[0]) is UNKNOWN:
                        # Which layer it is, only a run tells.
                        yield from ((layer, "__class__") for layer in module.modules() if _is_one_of(layer, kinds))
            if isinstance(node, ast.Call):
                if last_name(node.func) in _ASKING and node.args:
                    yield from ((layer, "__class__") for layer in _modules_of(node.args[0], scope))
                called = scope.value_of(node.func)
                if isinstance(called, nn.Module):
                    yield called, "__call__"
                elif called is not UNKNOWN:
                    waiting.append((called, getattr(called, "__self__", None)))


def _change_of(node: ast.Attribute, parents: Mapping[int, ast.AST], owner: nn.Module) -> str:
    """Return what code does to a layer or its weight, or to a view of that, by an attribute: "" for nothing."""
    is_set = isinstance(node.ctx, ast.Store) and is_candidate(owner) and kind_of(owner).declares(owner, node.attr)
    if is_set or node.attr in _WRITING:
        return _WRITTEN
    return _change_of_weight(node, parents) if node.attr in _WEIGHTS else ""


def _change_of_weight(node: ast.AST, parents: Mapping[int, ast.AST]) -> str:
    parent = parents.get(id(node))
    while isinstance(parent, ast.Attribute | ast.Subscript | ast.Call) and getattr(parent, "func", node) is node:
        is_method = isinstance(parent, ast.Attribute) and parent.attr.endswith("_") and not parent.attr.endswith("__")
        if isinstance(parent, ast.Attribute) and is_method:
            return "requires_grad_" if parent.attr == "requires_grad_" else _WRITTEN
        if isinstance(getattr(parent, "ctx", None), ast.Store):
            return _WRITTEN
        node, parent = parent, parents.get(id(parent))
    return _WRITTEN if isinstance(parent, ast.AugAssign) and parent.target is node else ""


def _is_one_of(layer: nn.Module, kinds: Any) -> bool:
    """Return True for a layer that may be rewritten and is of a class, or of one of several, which may not be known."""
    known = [each for each in (kinds if isinstance(kinds, tuple) else (kinds,)) if isinstance(each, type)]
    return any(isinstance(layer, each) for each in known if issubclass(each, nn.Module)) and is_candidate(layer)


def _modules_of(node: ast.AST, scope: Scope) -> list[nn.Module]:
    """Return the modules that an expression may stand for: one, or the items of what a loop goes through."""
    value = scope.value_of(node)
    if isinstance(value, nn.Module):
        return [value]
    items = [item.value for item in scope.bindings.get(last_name(node), ()) if isinstance(item, ast.Starred)]
    modules: list[nn.Module] = []
    for item in items:
        listing = item.func if isinstance(item, ast.Call) else item
        holder = scope.value_of(listing)
        if isinstance(listing, ast.Attribute) and isinstance(holder, types.MethodType):
            holder = holder.__self__
        if isinstance(holder, nn.Module):
            modules.extend(holder.modules())
        elif isinstance(holder, list | tuple):
            modules.extend(each for each in holder if isinstance(each, nn.Module))
    return modules


def _closure(function: types.FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    values: dict[str, Any] = {}
    for name, cell in cells:
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return values


def _is_metadata(node: ast.Attribute, parents: Mapping[int, ast.AST]) -> bool:
    """Return True for a weight of which only the shape, the device or the like is read."""
    parent = parents.get(id(node))
    return isinstance(parent, ast.Attribute) and parent.attr in METADATA


def _is_signature(node: ast.AST, scope: Scope) -> bool:
    """Return True for ``inspect.signature(function)``, whose ``parameters`` are the arguments of a function."""
    return isinstance(node, ast.Call) and scope.value_of(node.func) is inspect.signature


def _is_first(node: ast.Attribute, parents: Mapping[int, ast.AST]) -> bool:
    """Return True for ``next(module.parameters())``, by which code finds the device or the dtype of a model."""
    call = parents.get(id(node))
    outer = parents.get(id(call))
    if isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id == "iter":
        outer = parents.get(id(outer))
    return isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name) and outer.func.id == "next"

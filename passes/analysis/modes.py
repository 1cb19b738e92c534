"""Train and eval mode in a graph: reading a module's mode, and making one graph of two that differ in constants only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import fx
from torch.fx.node import map_arg

ValueT = TypeVar("ValueT")


class Mode:
    """A module's ``training`` flag while it is traced: an argument that follows the mode, and a truth value that is noted.

    As an argument of a call it becomes a node that reads the flag of that very module. Where code decides or computes by
    it, a graph would freeze the result, so ``asked`` is told. No number itself, since a number can be used as an index
    without being asked.
    """

    def __init__(self, training: bool, path: str, asked: Callable[[str], None]) -> None:
        """Stand for the flag of the module at ``path``; ``asked`` is called with the path when it decides something."""
        self.training = training
        self.path = path
        self.asked = asked

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        return tracer.create_node("get_attr", _flag_of(self.path), (), {})

    def __hash__(self) -> int:
        return hash(self.training)


def _asking(name: str) -> Callable[..., Any]:
    def operator(self: Mode, *args: Any) -> Any:
        self.asked(self.path)
        return getattr(bool, name)(self.training, *args)

    return operator


_OPERATORS = (
    "bool int float index neg pos invert eq ne lt gt le ge add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv "
    "mod rmod pow rpow xor rxor and rand or ror"
)
for _name in _OPERATORS.split():
    setattr(Mode, f"__{_name}__", _asking(f"__{_name}__"))


def by_mode(training: bool, in_train: ValueT, in_eval: ValueT) -> ValueT:
    """Return the first value in train mode and the second in eval mode; a node of graphs that follow the mode."""
    return in_train if training else in_eval


def unify(train: fx.Graph, evaluation: fx.Graph, deciders: Collection[str]) -> fx.Graph | None:
    """Make one graph of those of the two modes, if only constants differ and it is known by whose mode.

    Args:
        train: The graph in train mode.
        evaluation: The graph in eval mode.
        deciders: The paths of the modules whose mode decided something in either.
    """
    merged = copy.deepcopy(train)
    if len(merged.nodes) != len(evaluation.nodes):
        return None
    twins = dict(zip(evaluation.nodes, merged.nodes, strict=True))
    try:
        for other, node in list(twins.items()):
            _unify_node(node, other, twins, deciders)
    except _DifferenceError:
        return None
    return merged


class _DifferenceError(Exception):
    """The graphs differ in more than constants."""


def _unify_node(node: fx.Node, other: fx.Node, twins: dict[fx.Node, fx.Node], deciders: Collection[str]) -> None:
    if (node.op, node.target) != (other.op, other.target):
        raise _DifferenceError
    here = {path for path, _ in node.meta.get("nn_module_stack", {}).values()} | {""}
    owners = [path for path in deciders if path in here]

    def choose(in_train: Any, in_eval: Any) -> Any:
        if len(owners) != 1 or _holds_nodes(in_train) or _holds_nodes(in_eval):
            raise _DifferenceError
        with node.graph.inserting_before(node):
            flag = node.graph.create_node("get_attr", _flag_of(owners[0]))
            return node.graph.call_function(by_mode, (flag, in_train, in_eval))

    def unified(mine: Any, theirs: Any) -> Any:
        if isinstance(theirs, fx.Node) and twins[theirs] is mine:
            return mine
        if isinstance(mine, slice) and isinstance(theirs, slice):
            return slice(*(unified(getattr(mine, key), getattr(theirs, key)) for key in ("start", "stop", "step")))
        if type(mine) is type(theirs) and isinstance(mine, tuple | list) and len(mine) == len(theirs):
            return type(mine)(unified(one, its) for one, its in zip(mine, theirs, strict=True))
        if isinstance(mine, dict) and isinstance(theirs, dict) and list(mine) == list(theirs):
            return {key: unified(one, theirs[key]) for key, one in mine.items()}
        same = type(mine) is type(theirs) and not isinstance(mine, fx.Node) and mine == theirs
        return mine if same else choose(mine, theirs)

    if len(node.args) != len(other.args) or list(node.kwargs) != list(other.kwargs):
        raise _DifferenceError
    node.args = unified(tuple(node.args), tuple(other.args))
    node.kwargs = unified(dict(node.kwargs), dict(other.kwargs))


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(value, found.append)
    return bool(found)


def _flag_of(path: str) -> str:
    return f"{path}.training" if path else "training"

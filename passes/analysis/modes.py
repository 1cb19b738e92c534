"""Train and eval mode in a graph: a ``training`` flag to trace with, and one graph of two that differ in constants only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import fx
from torch.fx.node import map_arg

ValueT = TypeVar("ValueT")


class Mode:
    """The ``training`` flag of a module while it is traced.

    As an argument of a call it becomes a node that reads the flag of that very module, so the graph follows the mode. Where
    code branches on the flag or computes with it, the graph would freeze the result, so ``on_use`` is called with the path
    of the module. The class does not derive from int, because Python uses an int as an index without calling its methods.
    """

    def __init__(self, training: bool, path: str, on_use: Callable[[str], None]) -> None:
        self.training = training
        self.path = path
        self.on_use = on_use

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        return tracer.create_node("get_attr", _flag_path(self.path), (), {})

    def __hash__(self) -> int:
        return hash(self.training)


def _reported(name: str) -> Callable[..., Any]:
    """Return an operator of bool that reports its use."""

    def operator(self: Mode, *operands: Any) -> Any:
        self.on_use(self.path)
        return getattr(bool, name)(self.training, *operands)

    return operator


_OPERATORS = (
    "bool int float index neg pos invert eq ne lt gt le ge add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv "
    "mod rmod pow rpow xor rxor and rand or ror"
)
for _name in _OPERATORS.split():
    setattr(Mode, f"__{_name}__", _reported(f"__{_name}__"))


def by_mode(training: bool, in_train: ValueT, in_eval: ValueT) -> ValueT:
    """Return the first value in train mode and the second in eval mode; graphs that follow the mode call this."""
    return in_train if training else in_eval


def unify(train: fx.Graph, evaluation: fx.Graph, mode_users: Collection[str]) -> fx.Graph | None:
    """Make one graph of the graphs of both modes, which differ in constants by the mode of one module.

    Returns None if they differ in more, or if more than one module's mode can have decided a constant. ``mode_users`` are
    the paths of the modules whose own mode decided something in either.
    """
    unified = copy.deepcopy(train)
    if len(unified.nodes) != len(evaluation.nodes):
        return None
    twins = dict(zip(evaluation.nodes, unified.nodes, strict=True))
    try:
        for eval_node, node in list(twins.items()):
            _unify_node(node, eval_node, twins, mode_users)
    except _DifferenceError:
        return None
    return unified


class _DifferenceError(Exception):
    """The graphs differ in more than constants."""


def _unify_node(node: fx.Node, eval_node: fx.Node, twins: dict[fx.Node, fx.Node], mode_users: Collection[str]) -> None:
    """Let the constants of a node of the train graph follow the mode where the node of the eval graph has others."""
    if (node.op, node.target) != (eval_node.op, eval_node.target):
        raise _DifferenceError
    running = {path for path, _ in node.meta.get("nn_module_stack", {}).values()} | {""}
    deciding = [path for path in mode_users if path in running]

    def choose(in_train: Any, in_eval: Any) -> Any:
        if len(deciding) != 1 or _has_nodes(in_train) or _has_nodes(in_eval):
            raise _DifferenceError
        with node.graph.inserting_before(node):
            flag = node.graph.create_node("get_attr", _flag_path(deciding[0]))
            return node.graph.call_function(by_mode, (flag, in_train, in_eval))

    def unified(value: Any, eval_value: Any) -> Any:
        if isinstance(eval_value, fx.Node) and twins[eval_value] is value:
            return value
        if isinstance(value, slice) and isinstance(eval_value, slice):
            return slice(*(unified(getattr(value, key), getattr(eval_value, key)) for key in ("start", "stop", "step")))
        if type(value) is type(eval_value) and isinstance(value, tuple | list) and len(value) == len(eval_value):
            return type(value)(map(unified, value, eval_value))
        if isinstance(value, dict) and isinstance(eval_value, dict) and list(value) == list(eval_value):
            return {key: unified(item, eval_value[key]) for key, item in value.items()}
        same = type(value) is type(eval_value) and not isinstance(value, fx.Node) and value == eval_value
        return value if same else choose(value, eval_value)

    if len(node.args) != len(eval_node.args) or list(node.kwargs) != list(eval_node.kwargs):
        raise _DifferenceError
    node.args = unified(tuple(node.args), tuple(eval_node.args))
    node.kwargs = unified(dict(node.kwargs), dict(eval_node.kwargs))


def _has_nodes(value: Any) -> bool:
    nodes: list[fx.Node] = []
    map_arg(value, nodes.append)
    return bool(nodes)


def _flag_path(path: str) -> str:
    return f"{path}.training" if path else "training"

"""The GraphModule that a rewrite gives back: the original's class in all but its forward, which is a graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from tdfx.layers.copying import COMPILED, MODULE_STATE


class FactorizedGraphModule(fx.GraphModule):
    """A model of which ``forward`` is a graph and all else is the original's.

    Children keep their classes and paths, so the state_dict has the same keys and order as the original with its sites
    swapped. Each instance is also one of the original's class, so that its methods, properties and operators work. A model
    that does other things in train than in eval mode has a graph for each, over the same parameters; ``graph`` and ``code``
    are those of the present mode.
    """

    def __init__(self, body: nn.Module, graphs: Sequence[fx.Graph]) -> None:
        """Wrap a module, the ``body``; its children are shared.

        Args:
            body: The original, with its sites swapped.
            graphs: What its forward computes: one graph, or one for train and one for eval mode.
        """
        train, *others = graphs
        super().__init__(body, train, class_name=type(body).__name__)
        self.__dict__["_eval_graph"] = None
        self.__dict__["_graph_state"] = frozenset(self.__dict__) - MODULE_STATE
        self.__dict__["_body_class"] = type(body)
        self.__dict__.update(body.__dict__)
        # Only now, because GraphModule's constructor would call that of the original's class.
        own = type(self)
        methods = {"__getitem__": _body_item} if isinstance(body, nn.Sequential) else {}
        self.__class__ = type(own.__name__, (own, type(body)), {"__module__": own.__module__, **methods})
        if others:
            (self.__dict__["_eval_graph"],) = others
            self.recompile()

    @property
    def graph(self) -> fx.Graph:
        """The graph of the present mode."""
        evaluation = self.__dict__.get("_eval_graph")
        return self._graph if evaluation is None or self.training else evaluation

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        if self.__dict__.get("_eval_graph") is None or self.training:
            fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]
        else:
            self.__dict__["_eval_graph"] = graph
            self.recompile()

    @property
    def code(self) -> str:
        """The Python code of the graph of the present mode."""
        return str(self.graph.python_code("self").src)

    def recompile(self) -> Any:
        """Make the code of ``forward`` anew, after a graph was changed."""
        whole = type(self)
        if "_body_class" in self.__dict__:
            # GraphModule wraps __call__ on the instance's class, once; on a second class the two would call each other.
            self.__class__ = whole.__bases__[0]
        try:
            code = super().recompile()
            if self.__dict__.get("_eval_graph") is not None:
                # The code that GraphModule makes for a graph takes the module as an argument, so it serves for this one.
                evaluation = type(fx.GraphModule(self._tdfx_body(), self._tdfx_graphs()[1])).forward
                type(self).forward = _follow_mode(type(self).forward, evaluation)
        finally:
            self.__class__ = whole
        return code

    def _tdfx_graphs(self) -> list[fx.Graph]:
        """Return the graph, or those of train and of eval mode."""
        evaluation: fx.Graph | None = self.__dict__["_eval_graph"]
        return [self._graph] if evaluation is None else [self._graph, evaluation]

    def _tdfx_body(self) -> nn.Module:
        """Return an instance of the original class with this module's children, parameters, attributes and mode."""
        own = self.__dict__["_graph_state"] | {"_graph_state", "_body_class"}
        module: nn.Module = object.__new__(self.__dict__["_body_class"])
        # Code from compile() is for this module alone.
        kept = {key: value for key, value in self.__dict__.items() if key not in own and key != COMPILED}
        module.__dict__.update(kept)
        return module

    def __copy__(self) -> FactorizedGraphModule:
        return FactorizedGraphModule(self._tdfx_body(), copy.deepcopy(self._tdfx_graphs()))

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorizedGraphModule:
        body = self._tdfx_body()
        made = FactorizedGraphModule(body, copy.deepcopy(self._tdfx_graphs()))
        memo[id(self)] = made  # first, because a part may hold on to the whole
        made.__dict__.update(copy.deepcopy(body.__dict__, memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._tdfx_body(), [_pack(graph) for graph in self._tdfx_graphs()])


def _follow_mode(train: Callable[..., Any], evaluation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)  # with its signature, by which torch.export names the inputs
    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        return train(self, *args, **named) if self.training else evaluation(self, *args, **named)

    return forward


def _body_item(self: FactorizedGraphModule, index: Any) -> Any:
    """Index or slice a Sequential; a slice is one of the original's class."""
    body: Any = self._tdfx_body()
    return body[index]


@dataclass(frozen=True, slots=True)
class _Reference:
    """The place of a node in its graph, where a packed node has another one as an argument."""

    index: int


def _pack(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Return a graph as plain tuples, which pickle, as a graph does not."""
    places = {node: _Reference(index) for index, node in enumerate(graph.nodes)}

    def reference(one: Any) -> Any:
        return places[one] if isinstance(one, fx.Node) else one

    def pack(arguments: Any) -> Any:
        return map_aggregate(arguments, reference)

    return [(node.op, node.target, pack(node.args), pack(node.kwargs), node.name, node.type) for node in graph.nodes]


def _restore(body: nn.Module, packed: list[list[tuple[Any, ...]]]) -> FactorizedGraphModule:
    return FactorizedGraphModule(body, [_unpack(one) for one in packed])


def _unpack(packed: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def node_of(one: Any) -> Any:
        return nodes[one.index] if isinstance(one, _Reference) else one

    def unpack(arguments: Any) -> Any:
        return map_aggregate(arguments, node_of)

    for op, target, args, kwargs, name, kind in packed:
        nodes.append(graph.create_node(op, target, unpack(args), unpack(kwargs), name, kind))
    return graph

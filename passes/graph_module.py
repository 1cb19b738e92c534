"""The GraphModule that a rewrite gives back: the original's class in all but its forward, which is a graph."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from tdfx.structure import MODULE_STATE


class FactorizedGraphModule(fx.GraphModule):
    """A model of which ``forward`` is a graph and all else is the original's.

    Children keep their classes and paths, so the state_dict has the same keys and order as the original with its sites
    swapped. Each instance is also one of the original's class, so that its methods, properties and operators work.
    """

    def __init__(self, body: nn.Module, graph: fx.Graph) -> None:
        """Wrap a module, the ``body``, whose forward is what ``graph`` computes; the body's children are shared."""
        super().__init__(body, graph, class_name=type(body).__name__)
        self.__dict__["_graph_state"] = frozenset(self.__dict__) - MODULE_STATE
        self.__dict__["_body_class"] = type(body)
        self.__dict__.update(body.__dict__)
        # Only now, because GraphModule's constructor would call that of the original's class.
        own = type(self)
        self.__class__ = type(own.__name__, (own, type(body)), {"__module__": own.__module__})

    def _tdfx_body(self) -> nn.Module:
        """Return an instance of the original class with this module's children, parameters, attributes and mode."""
        own = self.__dict__["_graph_state"] | {"_graph_state", "_body_class"}
        module: nn.Module = object.__new__(self.__dict__["_body_class"])
        module.__dict__.update({key: value for key, value in self.__dict__.items() if key not in own})
        return module

    def __copy__(self) -> FactorizedGraphModule:
        return FactorizedGraphModule(self._tdfx_body(), copy.deepcopy(self.graph))

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorizedGraphModule:
        made = FactorizedGraphModule(copy.deepcopy(self._tdfx_body(), memo), copy.deepcopy(self.graph))
        memo[id(self)] = made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._tdfx_body(), _pack(self.graph))


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


def _restore(body: nn.Module, packed: list[tuple[Any, ...]]) -> FactorizedGraphModule:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def node_of(one: Any) -> Any:
        return nodes[one.index] if isinstance(one, _Reference) else one

    def unpack(arguments: Any) -> Any:
        return map_aggregate(arguments, node_of)

    for op, target, args, kwargs, name, kind in packed:
        nodes.append(graph.create_node(op, target, unpack(args), unpack(kwargs), name, kind))
    return FactorizedGraphModule(body, graph)

"""The GraphModule that a rewrite gives back: the original's class in all but its forward, which is a graph."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

_MODULE_STATE = frozenset(nn.Module().__dict__)
"""What every nn.Module holds: parameters, buffers, children, hooks, mode."""


class FactorizedGraphModule(fx.GraphModule):
    """A model of which ``forward`` is a graph and all else is the original's.

    Children keep their classes and paths, so the state_dict has the same keys and order as the original with its sites
    swapped. Each instance is also one of the original's class, so that its methods, properties and operators work.
    """

    def __init__(self, body: nn.Module, graph: fx.Graph) -> None:
        """Wrap a module, the ``body``, whose forward is what ``graph`` computes; the body's children are shared."""
        super().__init__(body, graph, class_name=type(body).__name__)
        self.__dict__["_graph_state"] = frozenset(self.__dict__) - _MODULE_STATE
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
        # A graph does not pickle: GraphModule pickles its code instead. The original's class is kept beside it.
        plain = fx.GraphModule(self._tdfx_body(), self.graph)
        return _restore, (self._tdfx_body(), plain)


def _restore(body: nn.Module, plain: fx.GraphModule) -> FactorizedGraphModule:
    return FactorizedGraphModule(body, plain.graph)

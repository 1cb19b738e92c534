"""The GraphModule that a rewrite gives back: the original's modules and attributes, the graph's forward."""

from __future__ import annotations

import copy
import inspect
import types
from typing import Any

from torch import fx, nn

from tdfx.passes.tracer import trace_once

_MODULE_STATE = tuple(nn.Module().__dict__)
"""What every nn.Module holds: parameters, buffers, children, hooks, mode."""


class FactorizedGraphModule(fx.GraphModule):
    """A model of which ``forward`` is a graph and all else is the original's.

    Children keep their classes and paths, so the state_dict has the same keys and order as the original with its sites
    swapped. Attributes and methods of the original's class can be read here too.
    """

    def __init__(self, body: nn.Module, graph: fx.Graph) -> None:
        """Wrap a module, the ``body``, whose forward is what ``graph`` computes; the body's children are shared."""
        super().__init__(body, graph, class_name=type(body).__name__)
        self.__dict__["_graph_state"] = frozenset(self.__dict__) - frozenset(_MODULE_STATE)
        self.__dict__["_body_class"] = type(body)
        self.__dict__.update(body.__dict__)

    def _tdfx_body(self) -> nn.Module:
        """Return an instance of the original class with this module's children, parameters, attributes and mode."""
        own = self.__dict__["_graph_state"] | {"_graph_state", "_body_class"}
        module: nn.Module = object.__new__(self.__dict__["_body_class"])
        module.__dict__.update({key: value for key, value in self.__dict__.items() if key not in own})
        return module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            body_class = self.__dict__.get("_body_class")
            if body_class is None or name.startswith("__") or not hasattr(body_class, name):
                raise
        found = inspect.getattr_static(body_class, name)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        return types.MethodType(found, self) if inspect.isfunction(found) else getattr(body_class, name)

    def __copy__(self) -> FactorizedGraphModule:
        return FactorizedGraphModule(self._tdfx_body(), self.graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorizedGraphModule:
        made = FactorizedGraphModule(copy.deepcopy(self._tdfx_body(), memo), copy.deepcopy(self.graph, memo))
        memo[id(self)] = made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        # A graph does not pickle; the body does, and tracing it again gives the same graph.
        return _from_body, (self._tdfx_body(),)


def _from_body(body: nn.Module) -> FactorizedGraphModule:
    graph, _ = trace_once(body)
    return FactorizedGraphModule(body, graph)

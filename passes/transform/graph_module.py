"""The GraphModule that a rewrite returns: the original's class in all but its forward, which is a graph."""

from __future__ import annotations

import copy
import functools
from abc import ABCMeta
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from torch import fx, nn
from torch.fx.node import map_aggregate

from tdfx.layers.module_state import COMPILED, MODULE_STATE
from tdfx.passes.program import Reads
from tdfx.passes.transform.premises import Premises


class FactorizedGraphModule(fx.GraphModule):
    """A model whose ``forward`` is a graph; all else is the original's.

    Children keep their classes and paths, so the state_dict has the keys and the order of the original with its sites
    swapped. Each instance is also an instance of the original's class, so that its methods, properties and operators work.
    A model that computes something else in train than in eval mode has a graph for each, over the same parameters;
    ``graph`` and ``code`` are those of the present mode.

    Where a premise of the graph has gone, as after ``model.scale = 2``, a call runs the original's ``forward``, and a copy
    has the original's class. A graph that was changed by hand always runs.
    """

    __jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "code"]  # noqa: RUF012 - as in torch

    def __init__(self, body: nn.Module, graphs: Sequence[fx.Graph]) -> None:
        """Share the children of a body, the original with its sites swapped; it has one graph, or one for each mode."""
        train, *others = graphs
        super().__init__(body, train, class_name=type(body).__name__)
        self.__dict__["_eval_graph"] = None
        self.__dict__["_shares_class"] = False
        self.__dict__["_tdfx_premises"] = None
        self.__dict__["_graph_state"] = frozenset(self.__dict__) - MODULE_STATE
        self.__dict__["_body_class"] = type(body)
        self.__dict__.update(body.__dict__)
        # The class is set only now, because GraphModule's constructor would call the constructor of the original's class.
        graph_class = type(self)
        methods = {"__getitem__": _body_item} if isinstance(body, nn.Sequential) else {}
        namespace = {"__module__": graph_class.__module__, **methods}
        self.__class__ = _make_class(graph_class.__name__, (graph_class, type(body)), namespace)
        if others:
            (self.__dict__["_eval_graph"],) = others
            self.recompile()
        self._share_class()

    def _tdfx_rely_on(self, reads: Reads) -> None:
        """From now on run the graph only as long as what it relies on is as it is now."""
        self.__dict__["_tdfx_premises"] = Premises.of(self, reads)

    def _tdfx_relied_on(self) -> Reads | None:
        """What the graph relies on; None if it runs in any case."""
        premises: Premises | None = self.__dict__["_tdfx_premises"]
        return None if premises is None else premises.reads

    def _tdfx_holds(self) -> bool:
        """Return True if the graph still stands for the model."""
        premises: Premises | None = self.__dict__["_tdfx_premises"]
        return premises is None or premises.hold(self)

    def _call_impl(self, *args: Any, **named: Any) -> Any:
        if "forward" in self.__dict__ or self._tdfx_holds():
            return super()._call_impl(*args, **named)  # type: ignore[no-untyped-call]
        self.__dict__["forward"] = functools.partial(self.__dict__["_body_class"].forward, self)
        try:
            return super()._call_impl(*args, **named)  # type: ignore[no-untyped-call]
        finally:
            self.__dict__.pop("forward", None)

    def _share_class(self) -> None:
        """Take the class of a module with the same code, because torch.func stacks only modules of one class."""
        codes = [graph.python_code("self") for graph in self._tdfx_graphs()]
        named = frozenset((name, id(value)) for code in codes for name, value in code.globals.items())
        key = (self.__dict__["_body_class"], tuple(code.src for code in codes), named)
        self.__class__ = _CLASSES.setdefault(key, type(self))
        self.__dict__["_shares_class"] = True

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep from the original's class that there is a class which derives from it: it may register those, or refuse."""

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
        """Generate the code of ``forward`` again, after a graph was changed."""
        if self.__dict__.get("_shares_class"):
            self._leave_class()
            self.__dict__["_tdfx_premises"] = None
        full_class = type(self)
        if "_body_class" in self.__dict__:
            # GraphModule wraps __call__ of the instance's class once; if it wrapped a second class, the two would call each
            # other for ever.
            self.__class__ = full_class.__bases__[0]
        try:
            code = super().recompile()
            if self.__dict__.get("_eval_graph") is not None:
                # GraphModule's code for a graph takes the module as an argument, so another module's code works here.
                evaluation = type(fx.GraphModule(self._tdfx_body(), self._tdfx_graphs()[1])).forward
                type(self).forward = _follow_mode(type(self).forward, evaluation)
        finally:
            self.__class__ = full_class
        return code

    def _leave_class(self) -> None:
        """Take a class of its own, with the same code, before that changes."""
        full_class = type(self)
        graph_class = full_class.__bases__[0]
        own = _make_class(graph_class.__name__, graph_class.__bases__, _own_namespace(graph_class))
        bases = (own, *full_class.__bases__[1:])
        self.__class__ = _make_class(full_class.__name__, bases, _own_namespace(full_class))
        self.__dict__["_shares_class"] = False

    def _tdfx_graphs(self) -> list[fx.Graph]:
        """Return the graph, or those of train and of eval mode."""
        evaluation: fx.Graph | None = self.__dict__["_eval_graph"]
        return [self._graph] if evaluation is None else [self._graph, evaluation]

    def _tdfx_body(self) -> nn.Module:
        """Return an instance of the original class with this module's children, parameters, attributes and mode."""
        # Code from compile() is for this module alone.
        left_out = {*self.__dict__["_graph_state"], "_graph_state", "_body_class", COMPILED}
        body: nn.Module = object.__new__(self.__dict__["_body_class"])
        body.__dict__.update({name: value for name, value in self.__dict__.items() if name not in left_out})
        return body

    def __copy__(self) -> Any:
        body = self._tdfx_body()
        if not self._tdfx_holds():
            return body
        return _relying(FactorizedGraphModule(body, copy.deepcopy(self._tdfx_graphs())), self._tdfx_relied_on())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        body, holds = self._tdfx_body(), self._tdfx_holds()
        copied = FactorizedGraphModule(body, copy.deepcopy(self._tdfx_graphs())) if holds else copy.copy(body)
        memo[id(self)] = copied  # before its attributes are copied, because one of them may refer to it
        copied.__dict__.update(copy.deepcopy(body.__dict__, memo))
        return _relying(copied, self._tdfx_relied_on()) if isinstance(copied, FactorizedGraphModule) else copied

    def __reduce__(self) -> tuple[Any, ...]:
        graphs = [_pack(graph) for graph in self._tdfx_graphs()] if self._tdfx_holds() else None
        return _restore, (self._tdfx_body(), graphs, self._tdfx_relied_on())


_CLASSES: WeakValueDictionary[Any, type] = WeakValueDictionary()
"""Class of the original, code, and what that names -> the class of the modules that have them."""


def _own_namespace(kind: type) -> dict[str, Any]:
    """Return what a class defines, for a class like it; what torch.fx has put there to call the class is left out."""
    left_out = {"__dict__", "__weakref__", "_wrapped_call", "__call__"}
    return {name: value for name, value in vars(kind).items() if name not in left_out}


def _make_class(name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    """Return a class of the metaclass that the bases have, without running code of a user's metaclass."""
    metaclass = type(bases[-1])
    make = ABCMeta if issubclass(metaclass, ABCMeta) else type
    made: type = make.__new__(metaclass, name, bases, namespace)
    return made


def _follow_mode(train: Callable[..., Any], evaluation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)  # with its signature, from which torch.export takes the names of inputs
    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        return train(self, *args, **named) if self.training else evaluation(self, *args, **named)

    return forward


def _body_item(self: FactorizedGraphModule, index: Any) -> Any:
    """Index or slice a Sequential; a slice has the original's class."""
    body: Any = self._tdfx_body()
    return body[index]


@dataclass(frozen=True, slots=True)
class _Reference:
    """Stands, among the arguments of a packed node, for the node at this index of the graph."""

    index: int


def _pack(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Return a graph as plain tuples, which can be pickled; a graph cannot."""
    references = {node: _Reference(index) for index, node in enumerate(graph.nodes)}

    def packed(value: Any) -> Any:
        return references[value] if isinstance(value, fx.Node) else value

    arguments = {node: map_aggregate((node.args, node.kwargs), packed) for node in graph.nodes}
    return [(node.op, node.target, *arguments[node], node.name, node.type) for node in graph.nodes]


def _restore(
    body: nn.Module, packed_graphs: list[list[tuple[Any, ...]]] | None, reads: Reads | None = None
) -> nn.Module:
    """Build a pickled model again; pickles of earlier versions do not say what a graph relies on."""
    if packed_graphs is None:
        return body
    return _relying(FactorizedGraphModule(body, [_unpack(packed) for packed in packed_graphs]), reads)


def _relying(module: FactorizedGraphModule, reads: Reads | None) -> FactorizedGraphModule:
    if reads is not None:
        module._tdfx_rely_on(reads)
    return module


def _unpack(packed: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def unpacked(value: Any) -> Any:
        return nodes[value.index] if isinstance(value, _Reference) else value

    for op, target, args, kwargs, name, kind in packed:
        nodes.append(graph.create_node(op, target, *map_aggregate((args, kwargs), unpacked), name, kind))
    return graph

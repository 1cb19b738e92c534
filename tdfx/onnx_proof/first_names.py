"""Give two graphs the same names for tensors that a model holds under several, before they are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tdfx.onnx_proof.graph import Graph


def with_first_names(graphs: tuple[Graph, Graph]) -> tuple[Graph, Graph]:
    """Return two graphs in which the tensors of each group have its first name.

    A group is left out where a graph stores more than one tensor for its names, dense or as factors: then they are
    different tensors.
    """
    first: dict[str, str] = {}
    for group in (group for graph in graphs for group in graph.aliases):
        if max(_count_stored(graph, group) for graph in graphs) == 1:
            name = next((first[name] for name in group if name in first), group[0])
            first.update(dict.fromkeys(group, name))
    model, reference = (_renamed(graph, first) for graph in graphs)
    return model, reference


def _count_stored(graph: Graph, group: Iterable[str]) -> int:
    """Return how many different tensors a graph stores for these names; factors stand for the dense tensors."""
    factors = {chain.weight: chain.factors[0] for chain in graph.chains}
    factors |= {chain.bias: chain.factor_bias for chain in graph.chains if chain.bias and chain.factor_bias}
    return len({factors.get(name, name) for name in group} & graph.initializers.keys())


def _renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    if not names:
        return graph

    def new(name: str | None) -> str:
        return names.get(name or "", name or "")

    def news(listed: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(new, listed))

    chains = tuple(
        replace(
            chain,
            factors=news(chain.factors),
            weight=new(chain.weight),
            factor_bias=new(chain.factor_bias) or None,
            bias=new(chain.bias) or None,
        )
        for chain in graph.chains
    )
    sources = {
        new(name): ("initializer", new(name), 0) if source[0] == "initializer" else source
        for name, source in graph.sources.items()
    }
    return replace(
        graph,
        outputs=tuple(replace(port, name=new(port.name)) for port in graph.outputs),
        initializers={new(name): replace(tensor, name=new(name)) for name, tensor in graph.initializers.items()},
        nodes=tuple(replace(node, inputs=news(node.inputs)) for node in graph.nodes),
        sources=sources,
        chains=chains,
    )

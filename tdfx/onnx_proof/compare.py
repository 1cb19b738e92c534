"""Compare two ONNX graphs: what they store, a walk, and, for what the walk leaves open, an isomorphism search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tdfx.onnx_proof.contract import Contracted, ContractionError, contract, described, differing
from tdfx.onnx_proof.difference import Difference, first_difference
from tdfx.onnx_proof.graph import Graph, read_graph
from tdfx.onnx_proof.interface import entry_difference, exit_difference, stored_difference
from tdfx.onnx_proof.isomorphism import isomorphic
from tdfx.onnx_proof.walk import Walk, walk

if TYPE_CHECKING:
    from onnx import ModelProto

    from tdfx.onnx_proof.chains import Chain

Settler = Literal["stored", "walk", "isomorphism"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two graphs match, and where they first differ."""

    structure: Difference | None
    """The first difference in opsets, stored tensors and nodes; None if they match."""
    settled_by: Settler
    """The stage that knew about the structure."""
    entry: Difference | None = None
    """The first difference in the inputs; None if they match."""
    exit: Difference | None = None
    """The first difference in the outputs; None if they match."""

    @property
    def interface(self) -> Difference | None:
        """The first difference in inputs and outputs."""
        return self.entry or self.exit

    @property
    def first(self) -> Difference | None:
        """The first difference, the structure's before the interface's; None if the graphs match."""
        return self.structure or self.interface

    @property
    def difference(self) -> str | None:
        """The first difference in words."""
        return None if self.first is None else self.first.text


@dataclass(frozen=True, slots=True)
class Proof:
    """A comparison, and what was contracted for it."""

    comparison: Comparison
    graphs: tuple[Graph, Graph]
    """The graphs that were compared, to which indices of nodes refer."""
    chains: tuple[Chain, ...] = ()
    """The chains that were contracted."""
    described: tuple[str, ...] = ()
    """The same in words."""


def compare_models(model: ModelProto, reference: ModelProto) -> Comparison:
    """Compare two ONNX models whose tensors are in memory.

    Raises:
        ExportError: if one of them is not a valid graph.

    """
    return compare_graphs(read_graph(model), read_graph(reference))


def compare_graphs(model: Graph, reference: Graph, output_names: bool = True) -> Comparison:
    """Compare two graphs: what goes in, what is stored, the nodes, what comes out.

    Args:
        model: One graph.
        reference: The other.
        output_names: False where the outputs have no names of their own: the exporter numbers what has none.
    """
    structure, settled_by = _structure(model, reference)
    return Comparison(
        structure,
        settled_by,
        entry=entry_difference(model, reference),
        exit=exit_difference(model, reference, output_names),
    )


def compare_factorized(model: Graph, reference: Graph) -> Proof:
    """Compare two graphs after contracting the chains of factors that only one of them has."""
    chains = differing(model.chains, reference.chains)
    if not chains:
        return Proof(compare_graphs(model, reference), (model, reference))
    made: list[Contracted] = []
    for role, graph in (("the model", model), ("the reference", reference)):
        try:
            made.append(contract(graph, chains))
        except ContractionError as error:
            found = Difference(f"in {role}, {error}", *((None, error.node) if made else (error.node, None)))
            comparison = Comparison(found, "walk", entry_difference(model, reference))
            return Proof(comparison, (model, reference), tuple(chains))
    comparison = compare_graphs(made[0].graph, made[1].graph, output_names=False)
    graphs = made[0].graph, made[1].graph
    return Proof(comparison, graphs, tuple(chains), described(chains, made[0].sizes, made[1].sizes))


def _structure(model: Graph, reference: Graph) -> tuple[Difference | None, Settler]:
    difference = stored_difference(model, reference)
    if difference is not None:
        return difference, "stored"
    if len(model.outputs) != len(reference.outputs):
        return first_difference(model, reference), "walk"
    state = walk(model, reference)
    if state.conflict is not None:
        return first_difference(model, reference) or state.conflict, "walk"
    if state.complete():
        return None, "walk"
    if isomorphic(model, reference, state.values):
        return None, "isomorphism"
    return first_difference(model, reference) or _unmatched(state), "isomorphism"


def _unmatched(state: Walk) -> Difference:
    """Name what is left when both graphs compute the same things as often, and yet do not match."""
    rest = [index for index in range(len(state.model.nodes)) if index not in state.nodes]
    names = f"the {len(rest)} node(s) that no output depends on, from {state.model.nodes[rest[0]]} on"
    return Difference(f"{names}, are wired differently", rest[0])

"""Compare two ONNX graphs: stored tensors, then a walk from the outputs, then an isomorphism search for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tdfx.onnx_proof.compare_interface import input_difference, output_difference, stored_difference
from tdfx.onnx_proof.contract_chains import ContractionError, contract, describe_contractions, differing_chains
from tdfx.onnx_proof.first_difference import Difference, first_difference
from tdfx.onnx_proof.first_names import with_first_names
from tdfx.onnx_proof.graph import Graph, read_graph
from tdfx.onnx_proof.isomorphism import isomorphic
from tdfx.onnx_proof.walk_from_outputs import walk

if TYPE_CHECKING:
    from onnx import ModelProto

    from tdfx.onnx_proof.factor_chains import Chain

Stage = Literal["stored", "walk", "isomorphism"]
"""The stages of a comparison, in their order."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two graphs match, and where they first differ."""

    structure: Difference | None
    """The first difference in opsets, stored tensors and nodes; None if they match."""
    settled_by: Stage
    """The stage that decided about the structure."""
    interface: Difference | None = None
    """The first difference in inputs and outputs; None if they match."""

    @property
    def first(self) -> Difference | None:
        """The first difference, the structure's before the interface's; None if the graphs match."""
        return self.structure or self.interface

    @property
    def difference(self) -> str | None:
        """The first difference as text."""
        return None if self.first is None else self.first.text


@dataclass(frozen=True, slots=True)
class FactorizedComparison:
    """A comparison of two graphs after chains of factors were contracted."""

    comparison: Comparison
    graphs: tuple[Graph, Graph]
    """The graphs that were compared; indices of nodes in differences refer to them."""
    chains: tuple[Chain, ...] = ()
    """The chains that were contracted."""
    contracted: tuple[str, ...] = ()
    """The same as text, a line for each."""


def compare_models(model: ModelProto, reference: ModelProto) -> Comparison:
    """Compare two ONNX models whose tensors are in memory; raise ExportError if one is not a valid graph."""
    return compare_graphs(read_graph(model), read_graph(reference))


def compare_graphs(model: Graph, reference: Graph, output_names: bool = True) -> Comparison:
    """Compare inputs, stored tensors, nodes and outputs; ignore the names of outputs if ``output_names`` is False."""
    structure, settled_by = _compare_structure(model, reference)
    interface = input_difference(model, reference) or output_difference(model, reference, output_names)
    return Comparison(structure, settled_by, interface)


def compare_factorized(model: Graph, reference: Graph) -> FactorizedComparison:
    """Compare two graphs after contracting the chains of factors that only one of them has."""
    model, reference = with_first_names((model, reference))
    chains = differing_chains(model.chains, reference.chains)
    if not chains:
        return FactorizedComparison(compare_graphs(model, reference), (model, reference))
    contracted = []
    for role, graph in (("the model", model), ("the reference", reference)):
        try:
            contracted.append(contract(graph, chains))
        except ContractionError as error:
            nodes = (error.node, None) if graph is model else (None, error.node)
            difference = Difference(f"in {role}, {error}", *nodes)
            comparison = Comparison(difference, "walk", input_difference(model, reference))
            return FactorizedComparison(comparison, (model, reference), chains)
    (first, sizes), (second, reference_sizes) = contracted
    comparison = compare_graphs(first, second, output_names=False)
    lines = describe_contractions(chains, sizes, reference_sizes)
    return FactorizedComparison(comparison, (first, second), chains, lines)


def _compare_structure(model: Graph, reference: Graph) -> tuple[Difference | None, Stage]:
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
    difference = first_difference(model, reference)
    if difference is None:
        rest = [index for index in range(len(model.nodes)) if index not in state.nodes]
        names = f"the {len(rest)} node(s) that no output depends on, from {model.nodes[rest[0]]} on"
        difference = Difference(f"{names}, are wired differently", rest[0])
    return difference, "isomorphism"

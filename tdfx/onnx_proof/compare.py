"""Compare two ONNX graphs: interface, walk, and, for what the walk leaves open, an isomorphism search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tdfx.onnx_proof.difference import first_difference
from tdfx.onnx_proof.graph import Graph, read_graph
from tdfx.onnx_proof.interface import entry_difference, exit_difference
from tdfx.onnx_proof.isomorphism import isomorphic
from tdfx.onnx_proof.walk import Walk, walk

if TYPE_CHECKING:
    from onnx import ModelProto

Settler = Literal["interface", "walk", "isomorphism"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether two graphs match, and where they first differ."""

    difference: str | None
    """The first difference in words; None if the graphs match."""
    settled_by: Settler
    """The stage that knew."""


def compare_models(model: ModelProto, reference: ModelProto) -> Comparison:
    """Compare two ONNX models whose tensors are in memory.

    Raises:
        ExportError: if one of them is not a valid graph.

    """
    return compare_graphs(read_graph(model), read_graph(reference))


def compare_graphs(model: Graph, reference: Graph) -> Comparison:
    """Compare two graphs: what goes in, the nodes, what comes out; the first difference in that order is reported."""
    difference = entry_difference(model, reference)
    if difference is not None:
        return Comparison(difference, "interface")
    if len(model.outputs) == len(reference.outputs):
        nodes = _compare_nodes(model, reference)
    else:
        nodes = Comparison(first_difference(model, reference), "walk")
    if nodes.difference is not None:
        return nodes
    difference = exit_difference(model, reference)
    return Comparison(difference, "interface") if difference is not None else nodes


def _compare_nodes(model: Graph, reference: Graph) -> Comparison:
    state = walk(model, reference)
    if state.conflict is not None:
        return Comparison(first_difference(model, reference) or state.conflict, "walk")
    if state.complete():
        return Comparison(None, "walk")
    if isomorphic(model, reference, state.values):
        return Comparison(None, "isomorphism")
    return Comparison(first_difference(model, reference) or _unmatched(state), "isomorphism")


def _unmatched(state: Walk) -> str:
    """Name what is left when both graphs compute the same things as often, and yet do not match."""
    rest = [node for index, node in enumerate(state.model.nodes) if index not in state.nodes]
    return f"the {len(rest)} node(s) that no output depends on, from {rest[0]} on, are wired differently"

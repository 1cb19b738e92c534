"""What a comparison of two models found: three questions, three answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_SHOWN = 8
"""Contracted chains that are printed; the others are counted. ``to_dict`` has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What ``verify`` found: same structure, same interface, same numbers? True if the model passes for the reference."""

    structure: str | None
    """The first difference in stored tensors and nodes, in topological order; None if they match."""
    interface: str | None
    """The first difference in the names, dtypes, shapes and dynamic axes of inputs and outputs; None if they match."""
    place: str | None = None
    """A drawing of where the first difference is, on either side; None if there is none, or nothing to show."""
    max_error: float
    """Largest ``max|a - b| / max|b|`` over the outputs, on the CPU; nan if they cannot be compared."""
    tolerance: float
    """The largest ``max_error`` that counts as rounding; no unit."""
    problem: str | None
    """Why the outputs cannot be compared; None if they can."""
    weight: str | None = None
    """The first stored tensor whose values differ, where the outputs do; None if all agree or were not compared."""
    inputs: Literal["given", "random"] = "given"
    """What the graphs were run on."""
    nodes: int
    """Number of nodes in the model's graph, with functions inlined and before chains are contracted."""
    contracted: tuple[str, ...] = ()
    """The chains of factors that were taken as one node each, on one side or both: site, scheme, ranks and nodes."""
    approximate: int = 0
    """How many of them are below full rank: above 0, the numbers may differ by more than rounding."""
    settled_by: Literal["stored", "walk", "isomorphism"]
    """The stage that decided on the structure."""
    seconds: float
    """Time for comparing the graphs and running them, in s; the export is not in it."""

    @property
    def structure_matches(self) -> bool:
        """True if the two graphs are the same; read from ``structure``, so it cannot disagree."""
        return self.structure is None

    @property
    def interface_matches(self) -> bool:
        """True if inputs and outputs are the same."""
        return self.interface is None

    @property
    def difference(self) -> str | None:
        """The first difference of the graphs, the structure's before the interface's; None if they match."""
        return self.structure or self.interface

    @property
    def graphs_match(self) -> bool:
        """True if structure and interface match."""
        return self.difference is None

    @property
    def numbers_match(self) -> bool:
        """True if the outputs agree within the tolerance; NaN never agrees."""
        return self.problem is None and self.max_error <= self.tolerance

    @property
    def ok(self) -> bool:
        """True if the graphs match, and the numbers do or are those of an approximation."""
        numbers = self.numbers_match or (self.approximate > 0 and math.isfinite(self.max_error))
        return self.graphs_match and numbers

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n  ".join(
            [
                "verified" if self.ok else "NOT verified",
                *self._structure_lines(),
                "same interface" if self.interface_matches else f"the interfaces differ: {self.interface}",
                *self._numbers_lines(),
                *(["", *self.place.split("\n")] if self.place is not None else []),
            ]
        ).replace("\n  \n", "\n\n")

    def _structure_lines(self) -> list[str]:
        after = f" after contracting {len(self.contracted)} chain(s) of factors" if self.contracted else ""
        if self.structure is not None:
            head = f"the structures differ{after}: {self.structure}"
        else:
            head = f"same structure ({self.nodes} nodes){after}"
        more = len(self.contracted) - _SHOWN
        shown = [f"  {one}" for one in self.contracted[:_SHOWN]]
        return [head, *shown, *([f"  and {more} more"] if more > 0 else [])]

    def _numbers_lines(self) -> list[str]:
        if self.problem is not None:
            return [f"the numbers cannot be compared: {self.problem}"]
        error = f"largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.1e}, on {self.inputs} inputs"
        if self.numbers_match:
            return [f"same numbers ({error})"]
        if self.approximate:
            return [
                f"the numbers differ by the approximation ({error}); {self.approximate} chain(s) are below full rank"
            ]
        return [f"the numbers differ ({error})", *([f"  {self.weight}"] if self.weight is not None else [])]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; an error that is no finite number becomes None."""
        return {
            "ok": self.ok,
            "structure_matches": self.structure_matches,
            "interface_matches": self.interface_matches,
            "numbers_match": self.numbers_match,
            "structure": self.structure,
            "interface": self.interface,
            "place": self.place,
            "max_error": self.max_error if math.isfinite(self.max_error) else None,
            "tolerance": self.tolerance,
            "problem": self.problem,
            "weight": self.weight,
            "inputs": self.inputs,
            "nodes": self.nodes,
            "contracted": list(self.contracted),
            "approximate": self.approximate,
            "settled_by": self.settled_by,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What ``export`` has written, and how it was proved."""

    files: tuple[Path, ...]
    """The ONNX file, and, for large models, the one with the weights."""
    size: int
    """Bytes of all of them."""
    nodes: int
    """Number of nodes, with functions inlined."""
    inputs: tuple[str, ...]
    """Name, dtype and shape of each input; dynamic axes are numbered ``?0``, ``?1`` and so on, equal ones alike."""
    outputs: tuple[str, ...]
    """The same of each output."""
    chains: int
    """How many sites are chains of factors."""
    max_error: float
    """Largest ``max|a - b| / max|b|`` between ONNX Runtime and the model, over outputs and sizes; no unit."""
    tolerance: float
    """The largest ``max_error`` that counts as rounding."""

    def __str__(self) -> str:
        chains = f", {self.chains} site(s) factorized" if self.chains else ""
        return (
            f"{self.files[0]}: {self.nodes} nodes, {self.size / 1e6:.1f} MB{chains}\n"
            f"  {'; '.join(self.inputs)} -> {'; '.join(self.outputs)}\n"
            f"  same numbers as the model (largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.1e})"
        )

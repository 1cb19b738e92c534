"""The results of ``verify`` and ``export``."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

_MAX_CHAINS = 8
"""Contracted chains that are printed; the others are counted. ``to_dict`` lists all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of ``verify``: whether structure, interface and numbers are the same; true in a condition if ``ok``."""

    structure: str | None
    """The first difference in stored tensors and nodes, in topological order; None if they match."""
    interface: str | None
    """The first difference in the names, dtypes, shapes and dynamic axes of inputs and outputs; None if they match."""
    place: str | None = None
    """A drawing of both sides at the first difference; None if there is no difference, or no node to show."""
    max_error: float
    """Largest ``max|a - b| / max|b|`` over the outputs, on the CPU; nan if they cannot be compared."""
    tolerance: float
    """The largest ``max_error`` that counts as rounding; no unit."""
    problem: str | None
    """Why the outputs cannot be compared; None if they can."""
    weight: str | None = None
    """If the outputs differ, the first stored tensor whose values differ; None if all agree or were not compared."""
    inputs: Literal["given", "random"] = "given"
    """Whether the graphs ran on the example inputs or on random ones."""
    nodes: int
    """Number of nodes in the model's graph, with functions inlined and before chains are contracted."""
    contracted: tuple[str, ...] = ()
    """The chains of factors that were contracted to one node: site, scheme, ranks and number of nodes."""
    approximate: int = 0
    """How many of them are below full rank; if any are, the numbers may differ by more than rounding."""
    settled_by: Literal["stored", "walk", "isomorphism"]
    """The stage that decided about the structure."""
    seconds: float
    """Time for comparing the graphs and running them, in s, without the export."""

    @property
    def structure_matches(self) -> bool:
        """True if the two graphs are the same."""
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
        """True if the graphs match, and the numbers too, unless a chain below full rank explains their difference.

        It does not if a tensor differs that is stored beside the factors, such as the weight of a kept layer.
        """
        is_explained = self.approximate > 0 and math.isfinite(self.max_error) and self.weight is None
        return self.graphs_match and (self.numbers_match or is_explained)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = "verified" if self.ok else "NOT verified"
        same = "same interface" if self.interface_matches else f"the interfaces differ: {self.interface}"
        text = "\n  ".join([head, *self._structure_lines(), same, *self._numbers_lines()])
        return text if self.place is None else f"{text}\n\n{textwrap.indent(self.place, '  ')}"

    def _structure_lines(self) -> list[str]:
        after = f" after contracting {len(self.contracted)} chain(s) of factors" if self.contracted else ""
        if self.structure is not None:
            head = f"the structures differ{after}: {self.structure}"
        else:
            head = f"same structure ({self.nodes} nodes){after}"
        lines = [head, *(f"  {line}" for line in self.contracted[:_MAX_CHAINS])]
        more = len(self.contracted) - _MAX_CHAINS
        return [*lines, f"  and {more} more"] if more > 0 else lines

    def _numbers_lines(self) -> list[str]:
        if self.problem is not None:
            return [f"the numbers cannot be compared: {self.problem}"]
        error = f"largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.1e}, on {self.inputs} inputs"
        if self.numbers_match:
            return [f"same numbers ({error})"]
        if self.approximate and self.weight is None:
            below = f"{self.approximate} chain(s) are below full rank"
            return [f"the numbers differ by the approximation ({error}); {below}"]
        return [f"the numbers differ ({error})", *([f"  {self.weight}"] if self.weight is not None else [])]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; an error that is not a finite number becomes None."""
        return {
            **{name: getattr(self, name) for name in ("ok", "structure_matches", "interface_matches", "numbers_match")},
            **asdict(self),
            "max_error": self.max_error if math.isfinite(self.max_error) else None,
            "contracted": list(self.contracted),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The result of ``export``: what was written, and how well it agrees with the model."""

    files: tuple[Path, ...]
    """The ONNX file, and for large models the file of its weights."""
    size: int
    """Bytes of all of them."""
    nodes: int
    """Number of nodes, with functions inlined."""
    inputs: tuple[str, ...]
    """Name, dtype and shape of each input; dynamic axes have their names."""
    outputs: tuple[str, ...]
    """Name, dtype and shape of each output."""
    chains: int
    """Number of sites that are chains of factors."""
    max_error: float
    """Largest ``max|a - b| / max|b|`` between ONNX Runtime and the model, over all outputs and runs; no unit."""
    tolerance: float
    """The largest ``max_error`` that counts as rounding."""

    def __str__(self) -> str:
        chains = f", {self.chains} site(s) factorized" if self.chains else ""
        return (
            f"{self.files[0]}: {self.nodes} nodes, {self.size / 1e6:.1f} MB{chains}\n"
            f"  {'; '.join(self.inputs)} -> {'; '.join(self.outputs)}\n"
            f"  same numbers as the model (largest relative error {self.max_error:.1e}, tolerance {self.tolerance:.1e})"
        )

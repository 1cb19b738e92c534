"""Products of an input with a parameter in an ONNX graph, as terms: which axes of the input meet which of the parameter.

Axes of the parameter are named by their position in the dense weight, so that a chain of factors has the terms of the
product that it replaces. All other axes are only told apart.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdfx.onnx_proof.graph import Node

Axes = tuple[str, ...]
"""The names of the axes of a tensor; ``REST`` stands for any number of leading ones."""

REST = "..."
_RANK = "rank"
_WEIGHT = "weight"


@dataclass(frozen=True, slots=True)
class Terms:
    """The axes of the input and of the output of a product."""

    input: Axes
    output: Axes

    def then(self, following: Terms) -> Terms | None:
        """Return the terms of this product and one of its output; None if they do not fit together."""
        pattern = list(following.input)
        names: dict[str, Axes] = {}
        given = list(self.output)
        if REST in pattern:
            count = len(given) - len(pattern) + 1
            names[REST], given, pattern = tuple(given[:count]), given[max(count, 0) :], pattern[1:]
        if len(given) != len(pattern):
            return None
        for name, axis in zip(pattern, given, strict=True):
            if _is_weight(name) and name != axis:
                return None
            names[name] = (axis,)
        output = tuple(axis for name in following.output for axis in names.get(name, (name,)))
        return Terms(self.input, output)

    def __str__(self) -> str:
        """Return the same text for the same product: leading axes that only pass through do not count."""
        first, last = list(self.input), list(self.output)
        while first and last and first[0] == last[0] and not _is_weight(first[0]):
            first.pop(0), last.pop(0)
        free = {name: f"free {number}" for number, name in enumerate(name for name in first if not _is_weight(name))}
        return " -> ".join(" ".join(free.get(name, name) for name in side) for side in (first, last))


def _is_weight(name: str) -> bool:
    return name.startswith(_WEIGHT)


def dense_axes(roles: str) -> Axes:
    """Return the names of the axes of a dense weight, which hold their roles.

    >>> dense_axes("io")
    ('weight i0', 'weight o1')
    """
    return tuple(f"{_WEIGHT} {role}{axis}" for axis, role in enumerate(roles))


def factor_axes(roles: str) -> tuple[Axes, Axes]:
    """Return the names of the axes in which both factors of a weight are multiplied.

    >>> factor_axes("gio")
    (('weight g0', 'rank', 'weight i1'), ('weight g0', 'weight o2', 'rank'))
    """
    groups, inner, outer = (
        [axis for axis, of in zip(dense_axes(roles), roles, strict=True) if of == role] for role in "gio"
    )
    return (*groups, _RANK, *inner), (*groups, *outer, _RANK)


def permuted(axes: Axes, node: Node) -> Axes:
    """Return the axes of a tensor after a Transpose."""
    order = ast.literal_eval(node.attribute("perm", str([*range(len(axes))][::-1])))
    return tuple(axes[axis] for axis in order)


def selected(axes: Axes, node: Node, index: str) -> Axes:
    """Return the axes of a tensor after a Gather of one slice, each with the slice in its name: those of two do not fit."""
    axis = int(node.attribute("axis", "0")) % len(axes)
    return tuple(f"{name} at {axes[axis]}={index}" for name in (*axes[:axis], *axes[axis + 1 :]))


def terms_of(node: Node, axes: Axes, operand: int) -> Terms | None:
    """Return the terms of a product, given the axes of a weight and which operand that is; None if it is another product."""
    if node.op == "Einsum":
        return _terms_of_equation(ast.literal_eval(node.attribute("equation", "''")), axes, operand)
    if operand != 1 or len(axes) < 2:
        return None
    *batch, inner, outer = axes if node.attribute("transB", "0") == "0" else (*axes[:-2], axes[-1], axes[-2])
    rows = ["rows"] if batch else []
    slices = [axis for axis in batch if not axis.startswith(f"{_WEIGHT} o")]  # the others broadcast one input
    return Terms((REST, *slices, *rows, inner), (REST, *batch, *rows, outer))


def _terms_of_equation(equation: str, axes: Axes, operand: int) -> Terms | None:
    operands, _, output = equation.replace(" ", "").partition("->")
    terms = operands.split(",")
    if len(terms) != 2 or len(terms[operand]) != len(axes):
        return None
    names = dict(zip(terms[operand], axes, strict=True))
    return Terms(_named(terms[1 - operand], names), _named(output, names))


def _named(term: str, names: dict[str, str]) -> Axes:
    rest = [REST] if REST in term else []
    return (*rest, *(names.get(letter, letter) for letter in term.replace(REST, "")))


def joined(terms: Sequence[Terms]) -> Terms | None:
    """Return the terms of successive products as one; None if they do not fit together."""
    result: Terms | None = terms[0]
    for following in terms[1:]:
        result = None if result is None else result.then(following)
    return result

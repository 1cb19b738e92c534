"""Products with a parameter that are one linear map, or one for each slice of it: matmul, bmm, einsum, grouped products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tdfx.factors.operation import Operation
from tdfx.kinds.functional import FunctionCall
from tdfx.kinds.layouts import Layout
from tdfx.kinds.views import View

ANY = "."
"""Stands for the ellipsis of an equation: any number of dimensions."""
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What equations may name dimensions by."""


@dataclass(frozen=True, slots=True)
class ProductCall(FunctionCall):
    """One product of an input with a parameter, as an equation like that of ``torch.einsum``."""

    terms: tuple[str, str, str] = ("", "", "")
    """The letters of the input, of the weight and of the output; a dot for an ellipsis."""
    view: View | None = None
    """Where the weight is a view of a parameter."""

    def on(self, view: View) -> ProductCall | None:
        """Return the call as one of the parameter of a view; None if it is no linear map for each slice."""
        x, weight, out = self.terms
        if len(weight) != len(view.axes):
            return None
        return replace(self, weight=view.parameter, view=view, name=self.name) if _roles(x, weight, out) else None

    def layout(self, weight_shape: Sequence[int]) -> Layout | None:
        """Return how the parameter holds the weight; None for a parameter of another number of dimensions."""
        roles = ["g"] * len(weight_shape)
        axes = range(len(weight_shape)) if self.view is None else self.view.axes
        letters = _roles(*self.terms)
        if letters is None or len(letters) != len(axes):
            return None
        for axis, letter in zip(axes, letters, strict=True):
            roles[axis] = letter
        return Layout(self.name, "".join(roles), tuple(weight_shape))

    def operation(self, weight_shape: Sequence[int]) -> Operation | None:
        """Return the linear map that the call computes, of all slices, with a weight of this shape."""
        layout = self.layout(weight_shape)
        return None if layout is None else layout.operation()

    def flow_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (rows, channels) of the input, if the rows were the same for all slices."""
        x, layout = self.rest["input"], self.layout(weight_shape)
        assert layout is not None
        groups, in_channels = layout.size("g"), layout.size("i")
        rows = x.numel() // max(in_channels, 1)
        shared = (
            self.name != "grouped_mm"
            and not (self.view and self.view.picked)
            and not self._groups <= set(self.terms[0])
        )
        return (rows if shared else -(-rows // groups), groups * in_channels)

    @property
    def _groups(self) -> set[str]:
        roles = _roles(*self.terms) or ""
        return {letter for letter, role in zip(self.terms[1], roles, strict=True) if role == "g"}

    def _letters(self, role: str) -> str:
        roles = _roles(*self.terms) or ""
        return "".join(letter for letter, of in zip(self.terms[1], roles, strict=True) if of == role)

    def arrange(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """Return functions that bring input and output to (..., channels), with the same rows; None where none can."""
        if self.name == "grouped_mm" or (self.view and self.view.picked) or not self._groups <= set(self.terms[0]):
            return None
        x, _, out = self.terms
        inner, outer, groups = self._letters("i"), self._letters("o"), self._letters("g")
        rows = "".join(letter for letter in out if letter not in outer + groups)

        def arranged(term: str, channels: str) -> Callable[[Tensor], Tensor]:
            count, equation = len(groups + channels), _equation(term, target=rows + groups + channels)
            return lambda tensor: torch.einsum(equation, tensor).flatten(-count)

        return arranged(x, inner), arranged(out, outer)

    def run(self, layout: Layout, first: Tensor, last: Tensor) -> Tensor:
        """Compute the call with two factors in the place of the weight.

        Args:
            layout: How the parameter holds the weight.
            first: Shape (g p, i), for a rank p in each slice.
            last: Shape (g o, p).
        """
        x, rank = self.rest["input"], last.shape[1]
        groups = layout.sizes("g")
        a, b = first.view(*groups, rank, *layout.sizes("i")), last.view(*groups, *layout.sizes("o"), rank)
        for _, index in sorted(self.view.picked if self.view else (), key=lambda pick: pick[0]):
            a, b = a[index], b[index]
        if self.name == "grouped_mm":
            out = _grouped(_grouped(x, a, self.rest["offs"]), b, self.rest["offs"])
        else:
            out = self._einsum(x, a, b)
        return out if self.rest.get("bias") is None else out + self.rest["bias"]

    def _einsum(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x_term, _, out_term = self.terms
        inner, outer, groups = self._letters("i"), self._letters("o"), self._letters("g")
        if not groups and len(inner) == len(outer) == 1 and x_term[:-1] + outer == out_term and x_term[-1] == inner:
            return F.linear(F.linear(x, a), b)
        rank = next(letter for letter in "pqrs" + LETTERS if letter not in "".join(self.terms))
        middle = "".join(letter for letter in out_term if letter not in outer) + rank
        x = torch.einsum(_equation(x_term, groups + rank + inner, target=middle), x, a)
        return torch.einsum(_equation(middle, groups + outer + rank, target=out_term), x, b)


def _equation(*terms: str, target: str) -> str:
    return f"{','.join(terms)}->{target}".replace(ANY, "...")


def _grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each group by the matrix (o, i) of its own.

    The kernels want sides of whole 16 bytes, so the output side is padded with zeros, which are cut off again.
    """
    step = max(16 // weight.element_size(), 1)
    missing, cut = -weight.shape[1] % step, -weight.shape[2] % step
    if missing or cut:
        weight, x = F.pad(weight, (0, cut, 0, missing)), F.pad(x, (0, cut))
    out = torch._grouped_mm(x, weight.mT, offs=offsets)
    return out[:, : out.shape[1] - missing] if missing else out


def _roles(x: str, weight: str, out: str) -> str | None:
    """Return the role of each letter of the weight; None if the product is no linear map of the input, slice by slice."""
    if ANY in weight or any(len(set(term)) < len(term) for term in (x, weight, out)) or (ANY in x) != (ANY in out):
        return None
    if not set(x) <= {*weight, *out} or not set(out) <= {*weight, *x}:
        return None
    kinds = {(True, True): "g", (True, False): "i", (False, True): "o"}
    roles = [kinds.get((letter in x, letter in out), "") for letter in weight]
    return "".join(roles) if all(roles) and {"i", "o"} <= set(roles) else None


@dataclass(frozen=True, slots=True)
class PackedCall(FunctionCall):
    """The three projections of an attention whose query, key and value are not all the same: a map of three groups."""

    def flow_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (rows, channels) of the three inputs side by side, with their mean number of rows."""
        inputs, channels = self.rest["input"], weight_shape[1]
        return sum(x.numel() for x in inputs) // (3 * channels), 3 * channels


def common_use(calls: Sequence[FunctionCall], shape: Sequence[int]) -> tuple[Operation | None, Layout | None] | None:
    """Return what the calls of one parameter compute, and how it holds the weight; None if they differ in that.

    The layout is None for a weight in torch's own layout. A projection that packs three is a map of three groups if any
    call has different inputs.
    """
    packed = [call for call in calls if isinstance(call, PackedCall)]
    layouts = [call.layout(shape) if isinstance(call, ProductCall) else None for call in calls]
    roles = {
        layout.roles if layout is not None else "" if call.dims else "oi"
        for call, layout in zip(calls, layouts, strict=True)
    }
    if len(roles) > 1:
        return None
    return (packed or calls)[0].operation(shape), None if None in layouts else layouts[0]

"""Products with a parameter that are one linear map, or one for each slice of it: matmul, bmm, einsum, grouped products."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tdfx.factors.operation import Operation
from tdfx.kinds.attention import packed_projections
from tdfx.kinds.functional import FunctionCall, parse_call
from tdfx.kinds.layouts import Layout
from tdfx.kinds.views import View, is_view_function, view_by

_NAMES: dict[Any, str] = {
    F.linear: "F.linear",
    torch.matmul: "matmul",
    Tensor.matmul: "matmul",
    Tensor.__matmul__: "matmul",
    operator.matmul: "matmul",
    torch.mm: "mm",
    Tensor.mm: "mm",
    torch.bmm: "bmm",
    Tensor.bmm: "bmm",
    torch.addmm: "addmm",
    torch.einsum: "einsum",
    **{
        getattr(owner, name): "grouped_mm"
        for owner, name in ((torch, "_grouped_mm"), (F, "grouped_mm"))
        if hasattr(owner, name)
    },
}
"""Function -> its name in plans."""
_OTHERS = (torch.baddbmm, torch.addbmm, torch.tensordot, torch.mv, F.bilinear)
"""Further functions that multiply matrices, with which no parameter is a site."""
_ORDERS = {
    "F.linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "grouped_mm": ("input", "weight", "offs", "bias"),
}
"""Name -> the order of its arguments; input and weight for all others."""
_ALIASES = {"other": "weight", "mat2": "weight", "mat_b": "weight", "mat1": "input", "mat_a": "input", "self": "input"}
_ANY = "."
"""Stands for the ellipsis of an equation: any number of dimensions."""


class Views:
    """Remembers which tensors are views of parameters, as long as they live."""

    def __init__(self) -> None:
        self._views: MutableMapping[Tensor, View] = WeakIdKeyDictionary()

    def of(self, value: Any) -> View | None:
        """Return the view that a value is, a parameter being one of itself; None for any other value."""
        if isinstance(value, nn.Parameter):
            return View.of(value)
        if isinstance(value, Tensor):
            return self._views.get(value)
        return value.as_view() if hasattr(type(value), "as_view") else None  # factorized

    def record(self, function: object, args: Sequence[Any], named: Mapping[str, Any], result: Any) -> bool:
        """Record a result that is a view; return False if the function makes none."""
        if not (args and is_view_function(function)):
            return False
        view = view_by(function, self.of(args[0]), args[1:], named)
        if view is not None and isinstance(result, Tensor):
            self._views[result] = view
        return view is not None

    def call(self, function: object, args: Sequence[Any], named: Mapping[str, Any]) -> FunctionCall | None:
        """Return the parts of a call as ``parse_use`` does; where its weight is a view, as a product of the parameter."""
        return parse_through(function, args, named, self.of)


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
        rank = next(letter for letter in "pqrs" + _LETTERS if letter not in "".join(self.terms))
        middle = "".join(letter for letter in out_term if letter not in outer) + rank
        x = torch.einsum(_equation(x_term, groups + rank + inner, target=middle), x, a)
        return torch.einsum(_equation(middle, groups + outer + rank, target=out_term), x, b)


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _equation(*terms: str, target: str) -> str:
    return f"{','.join(terms)}->{target}".replace(_ANY, "...")


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
    if _ANY in weight or any(len(set(term)) < len(term) for term in (x, weight, out)) or (_ANY in x) != (_ANY in out):
        return None
    if not set(x) <= {*weight, *out} or not set(out) <= {*weight, *x}:
        return None
    kinds = {(True, True): "g", (True, False): "i", (False, True): "o"}
    roles = [kinds.get((letter in x, letter in out), "") for letter in weight]
    return "".join(roles) if all(roles) and {"i", "o"} <= set(roles) else None


def product_name(function: object) -> str | None:
    """Return the name of a function that multiplies matrices; None for all others."""
    name = _NAMES.get(function) if isinstance(function, Hashable) else None
    return name or getattr(function, "__name__", None) if name or function in _OTHERS else None


def parse_product(
    function: object, args: Sequence[Any], named: Mapping[str, Any], weight: object = None, dims: int | None = None
) -> ProductCall | None:
    """Return the parts of a product that is linear in one operand with the other as its weight; None for all else.

    ``weight`` is the operand that is the weight; left out, it is the parameter among the operands of an einsum, and the
    second operand of the other products. ``dims`` are its dimensions, where it is no tensor.
    """
    name = _NAMES.get(function) if isinstance(function, Hashable) else None
    if name == "einsum":
        return _parse_einsum(args, weight) if not named else None
    if name is None:
        return None
    aliases = {**_ALIASES, "input": "bias"} if name == "addmm" else _ALIASES
    rest = {aliases.get(key, key): value for key, value in named.items()}
    rest |= dict(zip(_ORDERS.get(name, ("input", "weight")), args, strict=False))
    value = rest.pop("weight", None)
    extra = {key for key, each in rest.items() if each is not None} - {"input", "bias", "offs"}
    if extra or "input" not in rest or (name == "grouped_mm" and rest.get("offs") is None):
        return None
    terms = _terms(name, rest["input"], len(value.shape) if hasattr(value, "shape") else dims or 2)
    return None if terms is None else ProductCall(name, 0, False, value, rest, terms)


def _terms(name: str, x: Any, dims: int) -> tuple[str, str, str] | None:
    if name in ("F.linear", "mm", "addmm"):
        return (".i", "oi", ".o") if name == "F.linear" else (".i", "io", ".o")
    if name in ("bmm", "grouped_mm"):
        return ("gni", "gio", "gno")
    if dims < 2:
        return None
    if dims == 2:
        return ".i", "io", ".o"
    slices = _LETTERS[-dims + 2 :]
    x_dims = x.dim() if isinstance(x, Tensor) else dims
    if x_dims == 1:
        return "i", f"{slices}io", f"{slices}o"
    shared = slices[max(dims - x_dims, 0) :]
    more = _ANY if x_dims > dims else ""
    return f"{more}{shared}ni", f"{slices}io", f"{more}{slices}no"


def _parse_einsum(args: Sequence[Any], weight: object) -> ProductCall | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    sources, out = equation.replace(" ", "").replace("...", _ANY).split("->")
    first, second = sources.split(",")
    is_first = (
        operands[0] is weight
        if weight is not None
        else isinstance(operands[0], nn.Parameter) or hasattr(type(operands[0]), "as_view")
    )
    if is_first:
        first, second, operands = second, first, operands[::-1]
    return ProductCall("einsum", 0, False, operands[1], {"input": operands[0]}, (first, second, out))


def parse_use(
    function: object, args: Sequence[Any], named: Mapping[str, Any], weight: object = None, dims: int | None = None
) -> FunctionCall | None:
    """Return the parts of a call that computes a convolution, a linear map, or one for each slice of its weight.

    ``weight`` and ``dims`` are as for ``parse_product``.
    """
    if function is packed_projections:
        query, key, value, packed, bias = args
        return PackedCall("attention", 0, False, packed, {"input": (query, key, value), "bias": bias, "groups": 3})
    call = parse_call(function, args, named)
    return parse_product(function, args, named, weight, dims) if call is None else call


@dataclass(frozen=True, slots=True)
class PackedCall(FunctionCall):
    """The three projections of an attention whose query, key and value are not all the same: a map of three groups."""

    def flow_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (rows, channels) of the three inputs side by side, with their mean number of rows."""
        inputs, channels = self.rest["input"], weight_shape[1]
        return sum(x.numel() for x in inputs) // (3 * channels), 3 * channels


def parse_through(
    function: object, args: Sequence[Any], named: Mapping[str, Any], view_of: Callable[[Any], View | None]
) -> FunctionCall | None:
    """Return the parts of a call as ``parse_use`` does; where its weight is a view, as a product of the parameter.

    None for a product of a parameter that is no linear map for each slice of it.
    """
    call = parse_use(function, args, named)
    view = None if call is None else view_of(call.weight)
    if call is not None and view is not None and view.parameter is not call.weight:
        product = parse_product(function, args, named)
        call = None if product is None else product.on(view)
    if not isinstance(call, ProductCall) or view is None:
        return call
    return call if call.layout(call.weight.shape) is not None else None


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

"""From a call of a function of torch to the product with a parameter that it computes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tdfx.kinds.attention import packed_projections
from tdfx.kinds.functional import FunctionCall, parse_call
from tdfx.kinds.products import ANY, LETTERS, PackedCall, ProductCall
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
    slices = LETTERS[-dims + 2 :]
    x_dims = x.dim() if isinstance(x, Tensor) else dims
    if x_dims == 1:
        return "i", f"{slices}io", f"{slices}o"
    shared = slices[max(dims - x_dims, 0) :]
    more = ANY if x_dims > dims else ""
    return f"{more}{shared}ni", f"{slices}io", f"{more}{slices}no"


def _parse_einsum(args: Sequence[Any], weight: object) -> ProductCall | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    sources, out = equation.replace(" ", "").replace("...", ANY).split("->")
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

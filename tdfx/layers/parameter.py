"""The module that replaces a parameter which the model's own code passes to ``F.linear``, ``F.conv*`` or a product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tdfx.errors import ModelError
from tdfx.factors.functions import apply_factor, apply_operation
from tdfx.factors.operation import Operation
from tdfx.factors.recomputed import recomputed
from tdfx.kinds.attention import attend
from tdfx.kinds.functional import FunctionCall
from tdfx.kinds.layouts import Layout, Product
from tdfx.kinds.parse_products import parse_through
from tdfx.kinds.products import PackedCall, ProductCall
from tdfx.kinds.views import View, view_by
from tdfx.layers.factorized import Factorized, Origin, weight_of
from tdfx.layers.joined import read_only


class FactorizedParameter(Factorized):
    """A chain of small weights that replaces one parameter of a module, under the parameter's own name.

    The module's code stays as it is. Where it passes the parameter to the function that makes it a site, the chain is
    computed instead, with the stride, padding and dilation of that call. Every other use of the parameter gets the dense
    weight, which is joined at each use.
    """

    siblings: tuple[str, ...]
    """The names of all parameters of the module that held the original, in their order."""
    shape: torch.Size
    """The shape of the dense weight."""
    layout: tuple[int, bool]
    """Groups, and whether the convolution is transposed; a call is computed by the chain only if it agrees in both."""

    def __init__(self, factors: nn.Sequential, origin: Origin, siblings: Sequence[str] = ()) -> None:
        super().__init__(factors, origin)
        shape, layout = weight_of(origin.layer).shape, (self.operation.groups, self.operation.transposed)
        # Set in __dict__, because code that sets an attribute of a tensor here means the parameter, and gets an error.
        self.__dict__.update(siblings=tuple(siblings), shape=shape, layout=layout)

    def __prepare_scriptable__(self) -> FactorizedParameter:
        """Raise: torch.jit.script calls this before it compiles the code that reads the parameter."""
        raise ModelError(
            f"torch.jit.script cannot compile code that passes {self.origin.layer} as a parameter, since factors take its "
            f"place. Use torch.jit.trace or torch.export, or script what tdfx.merge returns."
        )

    def forward(self, input: Tensor, bias: Tensor | None = None, **geometry: Any) -> Tensor:  # type: ignore[override]
        """Compute what the function computes with the dense weight.

        Args:
            input: The function's input.
            bias: Shape (out,), or None.
            geometry: The function's other arguments: stride, padding, dilation, groups.
        """
        call = FunctionCall("", len(self.shape) - 2, self.layout[1], self, {"input": input, "bias": bias, **geometry})
        operation = call.operation(self.shape)
        assert operation is not None, f"{geometry} does not go with a weight of shape {tuple(self.shape)}"
        return self._apply_factors(operation, input, bias)

    def _apply_factors(self, operation: Operation, x: Tensor, bias: Tensor | None) -> Tensor:
        if (operation.groups, operation.transposed) != self.layout or not self.scheme.fits(operation):
            return apply_operation(operation, x, self.dense_weight(), bias)
        chain = self.scheme.chain(operation, self.origin.ranks)
        *first, (last, last_weight) = zip(chain, self.weights, strict=True)

        def compute(x: Tensor) -> Tensor:
            for step, weight in first:
                x = apply_factor(step, x, weight)
            return apply_factor(last, x, last_weight, bias)

        return recomputed(compute, x) if self.recompute else compute(x)

    def _compute(self, call: FunctionCall) -> Any:
        """Compute a call by the factors; NotImplemented for a call that they cannot stand for."""
        given: FunctionCall = replace(call, rest=tree_map(_dense, call.rest))
        if isinstance(given, PackedCall):
            query, key, value = given.rest["input"]
            return self._project(query, key, value, given.rest["bias"])
        if isinstance(given, ProductCall):
            layout = given.layout(self.shape)
            if layout is None or layout.roles != self._roles:
                return NotImplemented
            return self._multiply(given, layout)
        operation = given.operation(self.shape)
        if operation is None or (isinstance(self.origin.layer, Product) and self._roles != "oi"):
            return NotImplemented
        return self._apply_factors(operation, given.rest["input"], given.rest.get("bias"))

    def _multiply(self, call: ProductCall, layout: Layout) -> Tensor:
        weights = self.weights

        def compute(x: Tensor) -> Tensor:
            return replace(call, rest={**call.rest, "input": x}).run(layout, *weights)

        return recomputed(compute, call.rest["input"]) if self.recompute else call.run(layout, *weights)

    @property
    def _roles(self) -> str:
        """The roles of the parameter's dimensions in a product."""
        kind = self.kind
        return kind.roles if isinstance(kind, Layout) else "oi"

    def _project(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Compute the three projections of an attention, whose weights are one below the other in this one."""
        first, last = self.weights
        each = first.chunk(3) if self.layout[0] == 3 else (first,) * 3
        biases = (None,) * 3 if bias is None else bias.chunk(3)

        def compute(*inputs: Tensor) -> list[Tensor]:
            steps = zip(inputs, each, last.chunk(3), biases, strict=True)
            return [F.linear(F.linear(x, a), b, part) for x, a, b, part in steps]

        return recomputed(compute, query, key, value) if self.recompute else compute(query, key, value)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute the chain if the function's weight is factorized; give all other functions the dense weight."""
        return _call(func, args, dict(kwargs or {}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the dense weight."""
        return self.weights[0].device

    __jit_unused_properties__ = (*Factorized.__jit_unused_properties__, "dtype", "device", "_roles")

    def _computes_with(self, name: str) -> bool:
        return hasattr(Tensor, name) or super()._computes_with(name)

    def as_view(self) -> View:
        """Return the parameter with its dimensions as they are."""
        return View(self, tuple(range(len(self.shape))))

    def __getitem__(self, index: Any) -> Any:
        return self._view("__getitem__", index)

    def _view(self, name: str, *args: Any) -> Any:
        """Return a slice or a transpose: a view of the factors where products take the parameter by such views."""
        if isinstance(self.origin.layer, Product):
            return FactorizedView(self.as_view()).derive(name, *args)
        value = getattr(self.weight, name)
        return value(*args) if callable(value) else value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        if name in _VIEWS and isinstance(self.origin.layer, Product):
            return getattr(FactorizedView(self.as_view()), name)
        return getattr(self.weight, name)


_VIEWS = {"T", "mT", "t", "transpose", "permute"}
"""Attributes of a tensor that reorder its dimensions."""


class FactorizedView:
    """A factorized parameter with its dimensions in another order, or one slice of it.

    A product with it is computed by the factors; everything else gets that view of the dense weight.
    """

    def __init__(self, view: View) -> None:
        self.view = view

    def as_view(self) -> View:
        """Return what this is a view of, and how."""
        return self.view

    def derive(self, name: str, *args: Any) -> Any:
        """Return a view of this view, made by a method of tensors; of the dense weight where that is no such view."""
        function = getattr(Tensor, name)
        is_property = not callable(function)
        view = view_by(function.__get__ if is_property else function, self.view, args, {})
        if view is not None:
            return FactorizedView(view)
        value = getattr(read_only(self.dense_weight()), name)
        return value if is_property else value(*args)

    def dense_weight(self) -> Tensor:
        """Return the view of the dense weight, as a plain tensor."""
        weight = cast("FactorizedParameter", self.view.parameter).dense_weight()
        order = sorted(range(len(self.view.axes)), key=self.view.axes.__getitem__)
        for _, index in sorted(self.view.picked, key=lambda pick: pick[0], reverse=True):
            weight = weight.select(_, int(index))
        return weight.permute([order.index(dim) for dim in range(len(order))])

    @property
    def T(self) -> Any:  # noqa: N802 - the name in torch
        """The view with its dimensions reversed."""
        return self.derive("T")

    @property
    def mT(self) -> Any:  # noqa: N802 - the name in torch
        """The view with its last two dimensions exchanged."""
        return self.derive("mT")

    @property
    def shape(self) -> torch.Size:
        """The shape of the view."""
        return torch.Size(self.view.parameter.shape[axis] for axis in self.view.axes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the view."""
        return cast("torch.dtype", self.view.parameter.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the view."""
        return cast("torch.device", self.view.parameter.device)

    def __getitem__(self, index: Any) -> Any:
        return self.derive("__getitem__", index)

    def t(self) -> Any:
        """Return the matrix transposed."""
        return self.derive("t")

    def transpose(self, first: int, second: int) -> Any:
        """Return the view with two dimensions exchanged."""
        return self.derive("transpose", first, second)

    def permute(self, *dims: Any) -> Any:
        """Return the view with its dimensions in another order."""
        return self.derive("permute", *dims)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute a product by the factors; give all other functions the view of the dense weight."""
        return _call(func, args, dict(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(read_only(self.dense_weight()), name)


def _on_dense(name: str) -> Callable[..., Any]:
    def operator(self: FactorizedParameter, *args: Any) -> Any:
        return getattr(self.dense_weight(), name)(*args)

    return operator


def _multiply(self: Any, other: Any) -> Any:
    """Compute ``other @ self``."""
    return torch.matmul(other, self)


# Python looks operators up on the class, where __getattr__ is not asked.
_BINARY = ("add", "sub", "mul", "truediv", "pow", "matmul")
for _name in ("neg", "len", *_BINARY, *(f"r{_operator}" for _operator in _BINARY)):
    for _class in (FactorizedParameter, FactorizedView):
        setattr(_class, f"__{_name}__", _multiply if _name == "rmatmul" else _on_dense(f"__{_name}__"))


def _call(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call a function of torch that has a factorized parameter, or a view of one, among its arguments."""
    if func is F.multi_head_attention_forward:
        return attend(*args, **named)
    first = args[0] if args else None
    has_views = isinstance(first, FactorizedView) or (
        isinstance(first, FactorizedParameter) and isinstance(first.origin.layer, Product)
    )
    if has_views and (view := view_by(func, _view_of(first), args[1:], named)) is not None:
        return FactorizedView(view)
    call = parse_through(func, args, named, _view_of)
    if call is not None and isinstance(call.weight, FactorizedParameter):
        out = call.weight._compute(call)
        if out is not NotImplemented:
            return out
    # A function that writes gets the weight that cannot be written to, and raises.
    dense = _read_only if getattr(func, "__name__", "").endswith("_") or "out" in named else _dense
    args, named = tree_map(dense, (args, named))
    return func(*args, **named)


def _view_of(value: Any) -> View | None:
    return value.as_view() if isinstance(value, FactorizedParameter | FactorizedView) else None


def _dense(value: Any) -> Any:
    return value.dense_weight() if isinstance(value, FactorizedParameter | FactorizedView) else value


def _read_only(value: Any) -> Any:
    return read_only(value.dense_weight()) if isinstance(value, FactorizedParameter | FactorizedView) else value


def restore_parameter(owner: nn.Module, name: str, parameter: nn.Parameter, siblings: Sequence[str]) -> None:
    """Replace a factorized parameter of a module by a parameter, in its place in the original order.

    Args:
        owner: The module, which is changed.
        name: The name of the parameter in it.
        parameter: The parameter to put there.
        siblings: The names of the module's parameters in the original order; names that are not among them come last.
    """
    del owner._modules[name]
    parameters = {**owner._parameters, name: parameter}
    order = dict.fromkeys([*siblings, *parameters])
    owner._parameters = {key: parameters[key] for key in order if key in parameters}

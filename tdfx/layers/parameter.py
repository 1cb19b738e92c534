"""The module that stands for one rewritten parameter, where a model passes it to ``F.linear`` or ``F.conv*`` itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tdfx.factors.functions import apply_operation
from tdfx.factors.operation import Operation
from tdfx.kinds.functional import FunctionCall, parse_call
from tdfx.kinds.registry import operation_of
from tdfx.layers.factorized import Factorized, Origin, weight_of


class FactorizedParameter(Factorized):
    """A chain of small weights in place of one parameter of a module, under the parameter's own name.

    The module's code goes on as it was: where it passes the parameter to the function that it was found in, the chain is
    computed instead, with the stride, padding and dilation of that very call. Anything else that it does with the
    parameter gets the dense weight, joined anew each time.
    """

    siblings: tuple[str, ...]
    """The names of all parameters of the module that held the original, in their order."""
    shape: torch.Size
    """The shape of the dense weight."""
    layout: tuple[int, bool]
    """Groups, and whether it is that of a transposed convolution: what a call must agree in to be computed by the chain."""

    def __init__(self, factors: nn.Sequential, origin: Origin, siblings: Sequence[str] = ()) -> None:
        super().__init__(factors, origin)
        self.siblings = tuple(siblings)
        self.shape = weight_of(origin.layer).shape
        operation = operation_of(origin.layer)
        assert operation is not None
        self.layout = (operation.groups, operation.transposed)

    def forward(  # type: ignore[override]
        self, input: Tensor, bias: Tensor | None = None, **geometry: Any
    ) -> Tensor:
        """Compute what the function would with the dense weight.

        Args:
            input: As the function takes it.
            bias: Shape (out,), or None.
            geometry: The function's other arguments: stride, padding, dilation, groups.
        """
        call = FunctionCall("", len(self.shape) - 2, self.layout[1], self, {"input": input, "bias": bias, **geometry})
        operation = call.operation(self.shape)
        assert operation is not None, f"{geometry} does not go with a weight of shape {tuple(self.shape)}"
        return self._run(operation, input, bias)

    def _run(self, operation: Operation, x: Tensor, bias: Tensor | None) -> Tensor:
        if (operation.groups, operation.transposed) != self.layout or not self.scheme.fits(operation):
            return apply_operation(operation, x, self.weight, bias)
        chain = self.scheme.chain(operation, self.origin.ranks)
        *first, (last, last_weight) = zip(chain, self.weights, strict=True)
        for step, weight in first:
            x = apply_operation(step, x, weight)
        return apply_operation(last, x, last_weight, bias)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute the chain where a function's weight is factorized, and join the weight for everything else."""
        named = dict(kwargs or {})
        call = parse_call(func, args, named)
        if call is not None and isinstance(call.weight, FactorizedParameter):
            operation = call.operation(call.weight.shape)
            if operation is not None:
                return call.weight._run(operation, *map(_dense, (call.rest["input"], call.rest.get("bias"))))
        args, named = tree_map(_dense, (args, named))
        return func(*args, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.weight, name)


def _on_dense(name: str) -> Callable[..., Any]:
    def operator(self: FactorizedParameter, *args: Any) -> Any:
        return getattr(self.weight, name)(*args)

    return operator


# Python looks operators up on the class, so __getattr__ does not see them.
for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        setattr(FactorizedParameter, _operator, _on_dense(_operator))
for _operator in ("__neg__", "__getitem__", "__len__"):
    setattr(FactorizedParameter, _operator, _on_dense(_operator))


def _dense(value: Any) -> Any:
    return value.weight if isinstance(value, FactorizedParameter) else value


def restore_parameter(owner: nn.Module, name: str, parameter: nn.Parameter, siblings: Sequence[str]) -> None:
    """Put a parameter back into the module that held it, in its place in the original order."""
    del owner._modules[name]
    found = {**owner._parameters, name: parameter}
    order = [one for one in siblings if one in found]
    added = [one for one in found if one not in order]
    owner._parameters = {one: found[one] for one in [*order, *added]}

"""The module that replaces a parameter which the model's own code passes to ``F.linear`` or ``F.conv*``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tdfx.factors.functions import apply_operation
from tdfx.factors.operation import Operation
from tdfx.kinds.attention import attend
from tdfx.kinds.functional import FunctionCall, parse_call
from tdfx.layers.factorized import Factorized, Origin, weight_of


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
        for step, weight in first:
            x = apply_operation(step, x, weight)
        return apply_operation(last, x, last_weight, bias)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute the chain if the function's weight is factorized; give all other functions the dense weight."""
        named = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            return attend(*args, **named)
        call = parse_call(func, args, named)
        if call is not None and isinstance(call.weight, FactorizedParameter):
            operation = call.operation(call.weight.shape)
            if operation is not None:
                return call.weight._apply_factors(operation, *map(_dense, (call.rest["input"], call.rest.get("bias"))))
        # A function that writes gets the weight that cannot be written to, and raises.
        dense = _read_only if getattr(func, "__name__", "").endswith("_") or "out" in named else _dense
        args, named = tree_map(dense, (args, named))
        return func(*args, **named)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the dense weight."""
        return self.weights[0].device

    __jit_unused_properties__ = (*Factorized.__jit_unused_properties__, "dtype", "device")

    def _is_of_original(self, name: str) -> bool:
        return hasattr(Tensor, name) or super()._is_of_original(name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.weight, name)


def _on_dense(name: str) -> Callable[..., Any]:
    def operator(self: FactorizedParameter, *args: Any) -> Any:
        return getattr(self.dense_weight(), name)(*args)

    return operator


# Python looks operators up on the class, where __getattr__ is not asked.
_BINARY = ("add", "sub", "mul", "truediv", "pow", "matmul")
for _name in ("neg", "len", *_BINARY, *(f"r{_operator}" for _operator in _BINARY)):
    setattr(FactorizedParameter, f"__{_name}__", _on_dense(f"__{_name}__"))


def _dense(value: Any) -> Any:
    return value.dense_weight() if isinstance(value, FactorizedParameter) else value


def _read_only(value: Any) -> Any:
    return value.weight if isinstance(value, FactorizedParameter) else value


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

"""The module that replaces one layer by a chain of smaller layers."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.errors import ModelError
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.registry import kind_of, operation_of
from tdfx.kinds.stock import build_factor
from tdfx.layers.copying import copy_hooks, shell_of, structural_copy
from tdfx.layers.frozen import FROZEN_FACTORS, frozen_indices
from tdfx.layers.joined import read_only
from tdfx.layers.module_state import MODULE_STATE
from tdfx.layers.placement import full_precise, is_sharded, shard_like
from tdfx.layers.recompute import recompute_chain


@dataclass(frozen=True, slots=True)
class Origin:
    """The record from which ``merge`` builds the original layer again."""

    layer: nn.Module
    """The original layer; its parameters are placeholders on the meta device."""
    scheme: str
    """The name of the scheme that split it."""
    ranks: tuple[int, ...]
    """The ranks of the split, in the scheme's order."""


class Factorized(nn.Module):
    """A chain of small layers that replaces one convolution or linear layer.

    The factors are stock layers. Only the last has a bias, which is the original layer's own parameter. The attributes of
    the original (``in_channels``, ``stride`` and so on) can be read here too. ``weight`` is the dense weight that the
    factors represent; it is differentiable, and computed each time it is read.

    Args:
        factors: The layers of the chain, in the order of the data.
        origin: The layer that was replaced, and how its weight was split.
    """

    # Neither is annotated in the class, because torch.jit.script takes those annotations for types of TorchScript. The
    # second stands in the class for layers that earlier versions pickled.
    recompute = False
    """Whether the backward pass computes what flows between the factors again, so that training need not keep it."""

    def __init__(self, factors: nn.Sequential, origin: Origin) -> None:
        super().__init__()
        self.factors = factors
        self.origin = origin
        _describe_when_saved()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _describe_when_saved()

    @classmethod
    def of(cls, layer: nn.Module, scheme: Scheme, ranks: Sequence[int], weights: Sequence[Tensor]) -> Factorized:
        """Build the chain for a layer, which is left as it was.

        Args:
            layer: A layer with a stock forward. The chain has its bias, hooks, mode, dtype, device and memory format.
            scheme: The scheme that split the layer's weight into ``weights``.
            ranks: The ranks of the split, in the scheme's order.
            weights: The weights of the factors in the order of the data, in any floating-point dtype.
        """
        operation = operation_of(layer)
        assert operation is not None, f"no scheme applies to {layer}"
        bias = layer._parameters.get(kind_of(layer).bias or "")
        factors = _build_chain(scheme.chain(operation, ranks), weights, bias, weight_of(layer))
        takes_input = "input" in inspect.signature(layer.forward).parameters
        kind = cls if takes_input else FactorizedByName
        factorized = kind(factors, Origin(shell_of(layer), scheme.name, tuple(ranks)))
        copy_hooks(layer, factorized)
        return factorized.train(layer.training)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Run the chain.

        Args:
            input: The input of the original layer.
            output_size: The size of the output, for a transposed convolution only, as in torch: with strides, several sizes
                are possible. Only the last, spatial dimensions are read.

        Raises:
            TypeError: ``output_size`` is given and the layer was no transposed convolution.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            assert output_size is None, "factors take no output_size in TorchScript"
            return self.factors(input)  # type: ignore[no-any-return]
        else:  # noqa: RET505 - TorchScript compiles what does not stand in a branch
            return self._run(input, output_size)

    def _run(self, x: Tensor, output_size: Sequence[int] | None) -> Tensor:
        if output_size is not None and not self.operation.transposed:
            raise TypeError(f"{self.kind.name} takes no output_size: only transposed convolutions do.")
        compute = self.factors if output_size is None else partial(self._run_to_size, output_size)
        return recompute_chain(self, compute, x) if self.recompute else compute(x)

    def _run_to_size(self, output_size: Sequence[int], x: Tensor) -> Tensor:
        dims = self.operation.dims
        for factor in self.factors:
            if isinstance(factor, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                # The chain's size in the dimensions in which the factor has a kernel or a stride.
                sizes = zip(factor.kernel_size, factor.stride, x.shape[-dims:], tuple(output_size)[-dims:], strict=True)
                x = factor(x, [new if taps > 1 or stride > 1 else old for taps, stride, old, new in sizes])
            else:
                x = factor(x)
        return x

    @property
    def scheme(self) -> Scheme:
        """The scheme that joins the factors."""
        return get_scheme(self.origin.scheme)

    @property
    def operation(self) -> Operation:
        """The operation that the original layer computes."""
        operation = operation_of(self.origin.layer)
        assert operation is not None
        return operation

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The weights of the factors, in the order of the data."""
        return tuple(cast("nn.Parameter", factor.weight) for factor in self.factors)

    @property
    def kind(self) -> LayerKind:
        """The kind of the original layer."""
        return kind_of(self.origin.layer)

    @property
    def weight(self) -> Tensor:
        """The dense weight, of the original's shape; it is joined at each reading, so writing to it raises ModelError."""
        return read_only(self.dense_weight())

    def dense_weight(self) -> Tensor:
        """Return the dense weight as a plain tensor, for computations that do not write to it."""
        return self.kind.from_dense(self.join(*self.weights))

    def join(self, *factors: Tensor) -> Tensor:
        """Return the dense weight that given factors represent, in the layout of ``operation``; differentiable."""
        return self.scheme.join(self.operation, factors)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the original, shape (out,), or None."""
        return cast("nn.Parameter | None", self.factors[-1].bias)

    @torch.no_grad()
    def joined(self, *factors: Tensor) -> Tensor:
        """Return the dense weight in the original's shape, dtype and memory format, detached and not sharded.

        The product is computed in float64, so that it is rounded to the layer's dtype only once.

        Args:
            factors: The values of ``weights``; left out, they are read, by all processes together if they are sharded.
        """
        dense = self.join(*map(full_precise, factors or self.weights))
        return like_parameter(self.kind.from_dense(dense), self.kernel_factor)

    @torch.no_grad()
    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """Return the original layer with the joined weight and the present bias; this layer is left as it was.

        Args:
            weight: What ``joined`` returned; left out, it is called. The layer gets this tensor itself as its weight, or
                this process's shard of it if the factors are sharded.
        """
        layer = structural_copy(self.origin.layer)
        dense = shard_like(self.joined() if weight is None else weight, self.kernel_factor)
        layer._parameters[self.kind.weight] = nn.Parameter(dense, requires_grad=self.trains)
        if self.kind.bias:
            layer._parameters[self.kind.bias] = self.bias
        copy_hooks(self, layer)
        for name, value in self.__dict__.items():
            if name not in _OWN and not name.startswith("_"):
                layer.__dict__[name] = value
        return layer.train(self.training)

    def at_ranks(self, ranks: Sequence[int], weights: Sequence[Tensor]) -> Factorized:
        """Return a copy with factors of other ranks and the same bias; the arguments are those of ``of``."""
        layer = cast("Factorized", structural_copy(self))
        layer.factors = _build_chain(self.scheme.chain(self.operation, ranks), weights, self.bias, self.kernel_factor)
        for weight in layer.weights:
            weight.requires_grad_(self.trains)
        layer.__dict__.pop(FROZEN_FACTORS, None)  # the new factors are not frozen
        layer.origin = replace(self.origin, ranks=tuple(ranks))
        return layer.train(self.training)

    @property
    def kernel_factor(self) -> nn.Parameter:
        """The weight of the factor with the largest kernel; only this one shows the memory format of the layer."""
        return kernel_factor(self.weights)

    @property
    def kernel_index(self) -> int:
        """The index of the factor with the largest kernel in ``weights``."""
        return max(range(len(self.factors)), key=lambda index: math.prod(self.weights[index].shape[2:]))

    @property
    def trains(self) -> bool:
        """Whether a merged weight requires gradients: as ``kernel_factor`` does, or will once a schedule unfreezes it."""
        return self.kernel_factor.requires_grad or self.kernel_index in frozen_indices(self)

    def extra_repr(self) -> str:
        """Name the original, the scheme and the ranks."""
        text = f"{self.origin.layer}, scheme={self.origin.scheme!r}, ranks={self.origin.ranks}"
        return f"{text}, recompute=True" if self.recompute else text

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name != "training" and self._computes_with(name):
            raise ModelError(
                f"{name!r} is an attribute of the {self.kind.name} that these factors replace; the factors would go on as "
                f"before if it were set here. Set it before the rewrite, or keep the layer: Policy(exclude=...)."
            )
        super().__setattr__(name, value)

    def _computes_with(self, name: str) -> bool:
        """Return True for an attribute that decides what the original computes.

        What code has put on a layer besides, such as a counter or what a hook keeps, is set here, and merged back.
        """
        origin = self.__dict__.get("origin")
        return origin is not None and self.kind.declares(origin.layer, name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            origin = self.__dict__.get("origin")
            if origin is None or name.startswith("_"):
                raise
            if name in (self.kind.weight, self.kind.bias):
                return self.weight if name == self.kind.weight else self.bias
            if name not in origin.layer.__dict__:
                raise
        return origin.layer.__dict__[name]

    __jit_unused_properties__ = tuple(name for name, value in vars().items() if isinstance(value, property))
    """The properties that torch.jit.script leaves out: all."""


_OWN = MODULE_STATE | {"origin", "recompute", "siblings", "shape", "layout", FROZEN_FACTORS}
"""The attributes that are the factors' own."""


class FactorizedByName(Factorized):
    """The chain for a layer of a user's own kind whose input has another name, by which it may be called."""

    def forward(self, input: Tensor | None = None, output_size: Sequence[int] | None = None, **named: Tensor) -> Tensor:
        """Run the chain on the input, under whatever name it comes; TorchScript has no such arguments."""
        (x,) = named.values() if input is None else (input,)
        return self._run(x, output_size)


def _describe_when_saved() -> None:
    # Imported by name, because it builds on this file.
    importlib.import_module("tdfx.layers.pretrained").describe_when_saved()


def _build_chain(
    chain: Sequence[Operation], weights: Sequence[Tensor], bias: nn.Parameter | None, template: nn.Parameter
) -> nn.Sequential:
    parameters = [new_parameter(weight, template) for weight in weights]
    biases = [None] * (len(chain) - 1) + [bias]
    return nn.Sequential(*map(build_factor, chain, parameters, biases))


def kernel_factor(weights: Sequence[nn.Parameter]) -> nn.Parameter:
    """Return the weight with the largest kernel, the template for new weights: only it shows the memory format."""
    return max(weights, key=lambda weight: math.prod(weight.shape[2:]))


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the parameter that holds a layer's weight."""
    weight = layer._parameters[kind_of(layer).weight]
    assert weight is not None
    return weight


def new_parameter(weight: Tensor, template: nn.Parameter) -> nn.Parameter:
    """Return a parameter with a weight's values, and the template's dtype, layout, sharding and ``requires_grad``."""
    return nn.Parameter(shard_like(like_parameter(weight, template), template), requires_grad=template.requires_grad)


def like_parameter(weight: Tensor, template: Tensor) -> Tensor:
    """Return a new tensor with a weight's values and the template's dtype, device and memory format (channels last or not).

    For a weight on the meta device, which has a shape only, the values of the result are undefined.
    """
    like: Any = {"device": template.device, "dtype": template.dtype}
    values = torch.empty_like(weight, **like) if weight.is_meta else weight.detach().to(**like)
    if is_sharded(template):  # FSDP2 shards only contiguous parameters
        return values.clone(memory_format=torch.contiguous_format)
    for layout, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if values.dim() == dims and template.is_contiguous(memory_format=layout) and not template.is_contiguous():
            return values.clone(memory_format=layout)
    return values.clone(memory_format=torch.contiguous_format)

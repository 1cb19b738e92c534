"""The module that stands for one rewritten site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.registry import kind_of, operation_of
from tdfx.kinds.stock import build_layer
from tdfx.layers.copying import HOOKS, shell_of, structural_copy
from tdfx.layers.frozen import FROZEN_FACTORS, frozen_indices
from tdfx.layers.placement import full, is_sharded, shard_like
from tdfx.ranks.spectrum import working_dtype


@dataclass(frozen=True, slots=True)
class Origin:
    """What a factorized layer was, so that it can be built again."""

    layer: nn.Module
    """The original layer; its parameters are placeholders on the meta device."""
    scheme: str
    """The name of the scheme that split it."""
    ranks: tuple[int, ...]
    """The ranks it was split at, in the scheme's order."""


class Factorized(nn.Module):
    """A chain of small layers in place of one convolution or linear layer.

    The factors are stock layers under ``factors``; only the last has a bias, and it is the original's very parameter. What
    the original said of itself (``in_channels``, ``stride`` and the like) can be read here as well, and ``weight`` is the
    dense weight for which the factors stand, differentiable but computed at each reading.
    """

    factors: nn.Sequential
    origin: Origin

    def __init__(self, factors: nn.Sequential, origin: Origin) -> None:
        super().__init__()
        self.factors = factors
        self.origin = origin

    @classmethod
    def of(cls, layer: nn.Module, scheme: Scheme, ranks: Sequence[int], weights: Sequence[Tensor]) -> Factorized:
        """Build the chain for a layer, which is left as it was.

        Args:
            layer: A layer with a stock forward; its bias, hooks, mode, dtype and memory format are taken over.
            scheme: How ``weights`` were split from the layer's weight.
            ranks: In the scheme's order.
            weights: The factors' weights in the order of the data, in any floating dtype.
        """
        operation = operation_of(layer)
        assert operation is not None, f"no scheme stands for {layer}"
        kind = kind_of(layer)
        bias = layer._parameters.get(kind.bias) if kind.bias else None
        weight = weight_of(layer)
        factors = _build_chain(scheme.chain(operation, ranks), weights, bias, weight, weight.requires_grad)
        made = cls(factors, Origin(shell_of(layer), scheme.name, tuple(ranks)))
        _copy_hooks(layer, made)
        return made.train(layer.training)

    def forward(
        self, input: Tensor | None = None, output_size: Sequence[int] | None = None, **named: Tensor
    ) -> Tensor:  # the names of stock layers
        """Run the chain.

        Args:
            input: What the original layer takes.
            output_size: The spatial size to give back, for a transposed convolution alone, as torch's own take it: strides
                leave several sizes open. Leading dimensions may stand before it.
            named: The input, under the name that a user's own kind of layer has for it.

        Raises:
            TypeError: The layer was no transposed convolution.
        """
        (x,) = named.values() if input is None else (input,)
        if output_size is None:
            return cast("Tensor", self.factors(x))
        dims = self.operation.dims
        if not self.operation.transposed:
            raise TypeError(f"{self.kind.name} takes no output_size: only transposed convolutions do.")
        for factor in self.factors:
            if isinstance(factor, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                x = factor(x, _size_of_factor(factor, tuple(x.shape[-dims:]), tuple(output_size)[-dims:]))
            else:
                x = factor(x)
        return x

    @property
    def scheme(self) -> Scheme:
        """The scheme that joins the factors."""
        return get_scheme(self.origin.scheme)

    @property
    def operation(self) -> Operation:
        """What the original layer computes."""
        operation = operation_of(self.origin.layer)
        assert operation is not None
        return operation

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        """The factors' weights, in the order of the data."""
        return tuple(cast("nn.Parameter", factor.weight) for factor in self.factors)

    @property
    def kind(self) -> LayerKind:
        """What the original layer was."""
        return kind_of(self.origin.layer)

    @property
    def weight(self) -> Tensor:
        """The dense weight, shape as the original's: a value joined anew at each reading, so writing to it is lost."""
        return self.kind.from_dense(self.join(*self.weights))

    def join(self, *factors: Tensor) -> Tensor:
        """Return the dense weight, as its operation has it, for which given factors would stand."""
        return self.scheme.join(self.operation, factors)

    @property
    def bias(self) -> nn.Parameter | None:
        """The original's bias, shape (out,), or None."""
        return cast("nn.Parameter | None", self.factors[-1].bias)

    @torch.no_grad()
    def joined(self, *factors: Tensor) -> Tensor:
        """Return the dense weight in the original's shape, dtype and layout, detached, with all its values.

        The product is computed in float64, so that rounding to the layer's dtype happens once.

        Args:
            factors: The values of ``weights``, where they were read already.
        """
        given = factors or tuple(full(weight) for weight in self.weights)
        joined = self.join(*(weight.to(working_dtype(weight)) for weight in given))
        return like_parameter(self.kind.from_dense(joined), self.kernel_factor)

    @torch.no_grad()
    def merged(self, weight: Tensor | None = None) -> nn.Module:
        """Return the original layer with the joined weight and the bias of today; this layer is left as it was.

        Args:
            weight: What ``joined`` gave, where that was called already; it becomes the layer's own, or the part of it
                that this process is to hold where the factors are sharded.
        """
        layer = structural_copy(self.origin.layer)
        dense = shard_like(self.joined() if weight is None else weight, self.kernel_factor)
        layer._parameters[self.kind.weight] = nn.Parameter(dense, requires_grad=self.trains)
        if self.kind.bias:
            layer._parameters[self.kind.bias] = self.bias
        _copy_hooks(self, layer)
        return layer.train(self.training)

    def at_ranks(self, ranks: Sequence[int], weights: Sequence[Tensor]) -> Factorized:
        """Return a copy with other factors and the bias of today; this layer is left as it was.

        Args:
            ranks: In the scheme's order.
            weights: The factors' weights in the order of the data, in any floating dtype.
        """
        made = cast("Factorized", structural_copy(self))
        chain = self.scheme.chain(self.operation, ranks)
        made.factors = _build_chain(chain, weights, self.bias, self.kernel_factor, self.trains)
        made.__dict__.pop(FROZEN_FACTORS, None)  # of the new factors none is frozen for now
        made.origin = replace(self.origin, ranks=tuple(ranks))
        return made.train(self.training)

    @property
    def kernel_factor(self) -> nn.Parameter:
        """The factor that has the kernel: it shows the memory format, which on a pointwise one cannot be told."""
        return self.weights[self.kernel_index]

    @property
    def kernel_index(self) -> int:
        """Where the factor that has the kernel stands among ``weights``."""
        taps = [math.prod(weight.shape[2:]) for weight in self.weights]
        return taps.index(max(taps))

    @property
    def trains(self) -> bool:
        """Whether the dense weight would train: whether the factor with the kernel does, or is only frozen for now."""
        return self.kernel_factor.requires_grad or self.kernel_index in frozen_indices(self)

    def extra_repr(self) -> str:
        """Name the original, the scheme and the ranks."""
        return f"{self.origin.layer}, scheme={self.origin.scheme!r}, ranks={self.origin.ranks}"

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


def _build_chain(
    chain: Sequence[Operation],
    weights: Sequence[Tensor],
    bias: nn.Parameter | None,
    model: nn.Parameter,
    requires_grad: bool,
) -> nn.Sequential:
    """Build the factors; they are like ``model`` in dtype, device, layout and sharding."""
    biases = [None] * (len(chain) - 1) + [bias]
    return nn.Sequential(
        *(
            build_layer(
                step, nn.Parameter(shard_like(like_parameter(weight, model), model), requires_grad=requires_grad), own
            )
            for step, weight, own in zip(chain, weights, biases, strict=True)
        )
    )


def kernel_factor(weights: Sequence[nn.Parameter]) -> nn.Parameter:
    """Return the weight that shows where and how others like it are to lie: the one with the kernel."""
    return max(weights, key=lambda weight: math.prod(weight.shape[2:]))


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the parameter that holds a layer's weight."""
    weight = layer._parameters[kind_of(layer).weight]
    assert weight is not None
    return weight


def _size_of_factor(factor: nn.Module, before: tuple[int, ...], wanted: tuple[int, ...]) -> list[int]:
    """Return the size that a transposed factor gives back: the one asked for in the dimensions that it works on."""
    taps, strides = cast("tuple[int, ...]", factor.kernel_size), cast("tuple[int, ...]", factor.stride)
    works = [tap > 1 or stride > 1 for tap, stride in zip(taps, strides, strict=True)]
    return [new if mine else old for mine, new, old in zip(works, wanted, before, strict=True)]


def like_parameter(weight: Tensor, model: Tensor) -> Tensor:
    """Return a new tensor of the model's dtype and device, channels last where the model's weight is.

    A weight on the meta device is but a shape: what comes of it has the model's device too, and no particular values.
    """
    if weight.is_meta:
        made = torch.empty(weight.shape, device=model.device, dtype=model.dtype)
    else:
        made = weight.detach().to(device=model.device, dtype=model.dtype)
    if is_sharded(model):  # FSDP2 shards contiguous parameters alone
        return made.clone(memory_format=torch.contiguous_format)
    for layout, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if made.dim() == dims and model.is_contiguous(memory_format=layout) and not model.is_contiguous():
            return made.clone(memory_format=layout)
    return made.clone(memory_format=torch.contiguous_format)


def _copy_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in HOOKS:
        value = old.__dict__[name]
        new.__dict__[name] = value.copy() if hasattr(value, "copy") else value

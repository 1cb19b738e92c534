"""What tdfx must know about a class of layers to factorize them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from tdfx.factors.operation import Operation


class LayerKind(ABC):
    """A class of layers that compute a convolution or a linear map of one input.

    A call of such a layer must do no more than apply ``operation(layer)`` with its weight to the input and add its bias. The
    channels are the last dimension for a linear map, and dimension -1 - dims for a convolution. A new kind is one small
    class:

    Example:
        >>> import tdfx, torch
        >>> class Projection(torch.nn.Module):
        ...     def __init__(self, n_in, n_out):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.randn(n_in, n_out))
        ...
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> @tdfx.register_kind
        ... class ProjectionKind(tdfx.LayerKind):
        ...     layer = Projection
        ...     weight = "kernel"
        ...     bias = None
        ...
        ...     def operation(self, layer):
        ...         return tdfx.Operation(in_channels=layer.kernel.shape[0], out_channels=layer.kernel.shape[1])
        ...
        ...     def to_dense(self, weight):
        ...         return weight.mT
        ...
        ...     def from_dense(self, weight):
        ...         return weight.mT
        >>> (site,) = tdfx.plan(Projection(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> site.kind, site.scheme, site.ranks
        ('Projection', 'svd', (16,))
    """

    layer: ClassVar[type[nn.Module] | str]
    """The class, or its dotted name (``"package.module.Class"``) for a class that should not be imported here."""
    weight: ClassVar[str] = "weight"
    """The name of the parameter that holds the weight."""
    bias: ClassVar[str | None] = "bias"
    """The name of the parameter that holds the bias, shape (out,); a layer may have None in it. None for layers without."""
    methods: ClassVar[tuple[str, ...]] = ("forward",)
    """The methods that compute the output; a subclass that overrides one of them is not of this kind."""

    @abstractmethod
    def operation(self, layer: nn.Module) -> Operation | None:
        """Return what a layer computes, or None if no scheme can stand for it."""

    def to_dense(self, weight: Tensor) -> Tensor:
        """Return a view of the parameter (or of its moments) in the shape ``operation(layer).weight_shape``."""
        return weight

    def from_dense(self, weight: Tensor) -> Tensor:
        """Return a tensor of that shape in the layout of the parameter: the inverse of ``to_dense``."""
        return weight

    @property
    def name(self) -> str:
        """The name of the kind in plans: the class's own name."""
        return self.dotted_name.rpartition(".")[2]

    @property
    def dotted_name(self) -> str:
        """The full name of the layer class."""
        return self.layer if isinstance(self.layer, str) else _dotted(self.layer)

    def base(self, layer: type) -> type | None:
        """Return the class of this kind that a class is or derives from; None if there is none."""
        return next((kind for kind in layer.__mro__ if kind is self.layer or _dotted(kind) == self.layer), None)

    def declares(self, layer: nn.Module, name: str) -> bool:
        """Return True for an attribute that a layer computes with: what its class declares, or all, in a user's class."""
        if name in (self.weight, self.bias):
            return True
        base = self.base(type(layer))
        if base is None or not base.__module__.startswith("torch."):
            return name in layer.__dict__
        declaring = (each for each in base.__mro__ if each is not nn.Module)
        return any(name in vars(each).get("__annotations__", {}) for each in declaring)

    def is_intact(self, layer: nn.Module) -> bool:
        """Return True if a call of the layer does what its kind does, so that another module can replace it."""
        base = self.base(type(layer))
        if any(name in layer.__dict__ for name in self.methods) or type(layer).__call__ is not nn.Module.__call__:
            return False
        return all(getattr(type(layer), name) is getattr(base, name) for name in self.methods)


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

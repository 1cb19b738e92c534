"""How a parameter of any number of dimensions holds the weight of a linear map, or of one for each of its slices.

Each dimension of the parameter has a role, written as a letter: g for the slices, i for what is summed over with the input,
o for what comes out. So the weight of ``x @ w`` has the roles ``"io"``, and that of ``torch.bmm(x, w)`` ``"gio"``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tdfx.factors.operation import Operation
from tdfx.kinds.kind import LayerKind


class Product(nn.Module):
    """Holds a parameter as the layer of which it would be the weight; it is never called."""

    def __init__(self, layout: Layout, weight: nn.Parameter) -> None:
        super().__init__()
        self.layout = layout
        self.weight = weight

    def extra_repr(self) -> str:
        """Name the product, and the shape of the parameter."""
        return f"{self.layout.name}, {'×'.join(map(str, self.layout.shape))}"


@dataclass(frozen=True)
class Layout(LayerKind):
    """How a parameter holds the weight of a linear map: the kind of one ``Product``."""

    product: str
    """The name of the product."""
    roles: str
    """A letter for each dimension: g, i or o."""
    shape: tuple[int, ...]
    """The shape of the parameter."""

    layer = Product
    bias = None

    @property
    def name(self) -> str:
        """The name in plans, with the roles, from which ``layout_named`` makes the layout again."""
        return f"{self.product}[{self.roles}]"

    def size(self, role: str) -> int:
        """Return how many values there are along all dimensions of a role."""
        return math.prod(self.sizes(role))

    def sizes(self, role: str) -> list[int]:
        """Return the sizes of the dimensions of a role."""
        return [size for letter, size in zip(self.roles, self.shape, strict=True) if letter == role]

    def operation(self, layer: nn.Module | None = None) -> Operation:
        """Return the linear map."""
        groups, in_channels, out_channels = map(self.size, "gio")
        return Operation(in_channels=groups * in_channels, out_channels=groups * out_channels, groups=groups)

    @property
    def _order(self) -> list[int]:
        return [axis for role in "goi" for axis, letter in enumerate(self.roles) if letter == role]

    def to_dense(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix (g o, i)."""
        return weight.permute(self._order).reshape(-1, self.size("i"))

    def from_dense(self, weight: Tensor) -> Tensor:
        """Return a matrix (g o, i) in the layout of the parameter."""
        order = self._order
        shaped = weight.reshape([self.shape[axis] for axis in order])
        return shaped.permute([order.index(axis) for axis in range(len(order))])


def layout_named(kind: str, shape: Sequence[int]) -> Layout | None:
    """Return the layout that a plan names, for a parameter of this shape; None if the name is that of no layout.

    >>> layout_named("bmm[gio]", (4, 8, 16)).operation().weight_shape
    (64, 8)
    """
    match = re.fullmatch(r"(\w[\w.]*)\[([gio]+)\]", kind)
    return Layout(match[1], match[2], tuple(shape)) if match and len(match[2]) == len(shape) else None

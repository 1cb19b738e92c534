"""Second moments of a site's input channels and of its output gradients, and how rows are sampled for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SIDE = 2048
"""Channels of one group up to which a second moment is a full matrix; above, only its diagonal is kept."""

FEWEST_ROWS = 256
"""Rows that are sampled from every call, as far as it has that many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMoments:
    """What flows through one site in training, as second moments over rows: one row per sample and position.

    Each moment has the shape (g, c, c), for g groups of c channels, or (g, c), its diagonal, where c is longer than
    ``LARGEST_SIDE``. Its dtype is float32, or float64 where the site computes in float64.
    """

    inputs: Tensor | None
    """The second moment of the input channels."""
    outputs: Tensor | None
    """The second moment of the gradients of the output channels. Each unit's moment is divided by its mean diagonal before
    the units are averaged by their rows, so the scale of the loss does not matter and the mean of the diagonal is 1."""
    samples: int
    """Rows of the input that ``inputs`` is the mean of."""


def moment_shape(groups: int, channels: int) -> tuple[int, ...]:
    """Return the shape of the second moment of all channels of a layer.

    >>> moment_shape(2, 64), moment_shape(1, 4096)
    ((2, 32, 32), (1, 4096))
    """
    side = channels // groups
    return (groups, side) if side > LARGEST_SIDE else (groups, side, side)


def second_moment(rows: Tensor, groups: int) -> Tensor:
    """Return the sum over rows of the products of channels, of the shape ``moment_shape``; float32, or float64 of float64.

    Args:
        rows: Shape (rows, channels), floating-point.
        groups: Blocks of channels that are taken apart.
    """
    rows_ngc = rows.to(torch.promote_types(rows.dtype, torch.float32)).view(len(rows), groups, rows.shape[1] // groups)
    rows_gnc = rows_ngc.transpose(0, 1)
    return rows_gnc.square().sum(1) if len(moment_shape(groups, rows.shape[1])) == 2 else rows_gnc.mT @ rows_gnc


def mean_diagonal(moment: Tensor) -> Tensor:
    """Return the mean of a moment's diagonal over all groups and channels, a tensor of no dimensions."""
    return (moment if moment.dim() == 2 else moment.diagonal(dim1=1, dim2=2)).mean()


def sample_rows(x: Tensor, channel_dim: int, share: float, turn: int) -> Tensor:
    """Return a share of a tensor's rows, (rows, channels), and at least ``FEWEST_ROWS``; only these are copied.

    The rows are taken at a stride that has no factor in common with the last dimension of the positions, so that all of
    its columns are sampled. The layout of the tensor in memory does not matter.

    Args:
        x: Shape (..., channels, ...).
        channel_dim: The dimension of the channels, negative.
        share: The share of the rows, in (0, 1].
        turn: Shifts the rows that are taken, so that each turn takes other rows.

    >>> sample_rows(torch.arange(12.0).view(4, 3), -1, 1.0, 0).shape
    torch.Size([4, 3])
    """
    positions = x.movedim(channel_dim, -1)
    positions = positions if positions.dim() > 1 else positions.unsqueeze(0)
    sizes = positions.shape[:-1]
    rows = math.prod(sizes)
    stride = max(rows // max(math.ceil(rows * share), min(rows, FEWEST_ROWS), 1), 1)
    while math.gcd(stride, sizes[-1]) > 1:
        stride -= 1
    rest = torch.arange(turn % stride, rows, stride, device=x.device)
    index = []
    for size in reversed(sizes):
        index.append(rest % size if size else rest)
        rest = rest // max(size, 1)
    return positions[tuple(reversed(index))]

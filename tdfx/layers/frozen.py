"""The record of the factors of a layer that ``Freeze`` has frozen for now.

``Freeze`` puts the record on the layers that it schedules, so that merge, rewrite and checkpoints can tell such a factor
from one that the user froze. A structural copy, which shares the factors, shares the record; a deep copy or a pickle has
its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

FROZEN_FACTORS = "rest"
"""The attribute of a layer that holds its record; pickles of whole models from earlier versions use the same name."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class FrozenFactors:
    """The record of one layer."""

    indices: frozenset[int] = frozenset()
    """Indices of the factors whose ``requires_grad`` was set to False by the schedule, not by the user."""


def frozen_factors(layer: nn.Module) -> FrozenFactors:
    """Return the record of a layer, after putting an empty one on a layer that has none."""
    return cast("FrozenFactors", layer.__dict__.setdefault(FROZEN_FACTORS, FrozenFactors()))


def frozen_indices(layer: nn.Module) -> frozenset[int]:
    """Return the indices of the factors of a layer that a schedule has frozen for now."""
    return cast("FrozenFactors", layer.__dict__.get(FROZEN_FACTORS, FrozenFactors())).indices

"""Which factors of a layer ``Freeze`` keeps from training for now.

``Freeze`` puts this record on the layers that it schedules. A structural copy, which shares the factors, shares the record;
a deep copy or a pickle takes it along. So merge, rewrite and checkpoints can tell a factor that is frozen for now
from one that the user froze.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

FROZEN_FACTORS = "rest"
"""The attribute of a layer that holds its record; pickles of whole models from earlier versions have it too."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class FrozenFactors:
    """The record of one layer."""

    indices: frozenset[int] = frozenset()
    """Indices of the factors that are frozen for now: the schedule set their ``requires_grad``, not the user."""


def frozen_factors(layer: nn.Module) -> FrozenFactors:
    """Return the record of a layer, which is put on it if it has none."""
    return cast("FrozenFactors", layer.__dict__.setdefault(FROZEN_FACTORS, FrozenFactors()))


def frozen_indices(layer: nn.Module) -> frozenset[int]:
    """Return the indices of the factors of a layer that are frozen for now."""
    record = layer.__dict__.get(FROZEN_FACTORS)
    return frozenset() if record is None else cast("FrozenFactors", record).indices

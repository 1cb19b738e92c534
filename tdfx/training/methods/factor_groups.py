"""Which factors of a layer train together, and how a group is frozen; factors that the user froze are never thawed."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tdfx.errors import ModelError, OptimizerError
from tdfx.layers.factorized import Factorized
from tdfx.layers.frozen import frozen_factors, frozen_indices

Train = Literal["alternate", "each", "kernel", "others"]
"""Which factors of a layer train: the one with the kernel and the others by turns, each one by turns, or always the same."""


@dataclass(frozen=True, slots=True)
class FactorGroups:
    """The factors of one layer, in groups that train by turns."""

    name: str
    """The layer's path in the model."""
    layer: Factorized
    weights: tuple[nn.Parameter, ...]
    """The factors' weights, as the optimizer holds them."""
    groups: tuple[frozenset[int], ...]
    """The indices of the factors that train together, in the order of their turns."""
    kept: frozenset[int]
    """The indices of the factors that the user froze."""

    @property
    def scheduled(self) -> tuple[nn.Parameter, ...]:
        """The weights that have a turn."""
        return tuple(self.weights[index] for index in sorted(frozenset().union(*self.groups)))

    def train_group(self, turn: int) -> bool:
        """Let the group of a turn train and freeze the others; return whether anything changed."""
        return self._freeze(frozenset(range(len(self.weights))) - self.groups[turn % len(self.groups)] - self.kept)

    def train_all(self) -> bool:
        """Let all factors train that the user did not freeze; return whether anything changed."""
        return self._freeze(frozenset())

    def frozen_names(self) -> tuple[str, ...]:
        """Return the names of the parameters that are frozen for now."""
        stem = f"{self.name}." if self.name else ""
        return tuple(f"{stem}factors.{index}.weight" for index in sorted(frozen_indices(self.layer)))

    def _freeze(self, indices: frozenset[int]) -> bool:
        """Freeze exactly the factors at these indices; return whether anything changed."""
        record = frozen_factors(self.layer)
        before = record.indices
        for index in before - indices:
            self.weights[index].requires_grad_(True)
        # A factor that the user froze in the meantime is not recorded, so that it is not thawed later.
        fresh = frozenset(index for index in indices - before if self.weights[index].requires_grad)
        for index in fresh:
            self.weights[index].requires_grad_(False)
            self.weights[index].grad = None  # the optimizer would still use it
        record.indices = (before & indices) | fresh
        return record.indices != before


def find_factor_groups(model: nn.Module, train: Train, held: Container[int]) -> list[FactorGroups]:
    """Return the layers whose factors can train by turns; ``held`` are the ids of the optimizer's parameters."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}
    if not layers:
        raise ModelError(
            f"{type(model).__name__} holds no factorized layer whose factors could train by turns. Pass the model that "
            f"tdfx.rewrite returned, and make a new Freeze after each rewrite."
        )
    groups = [entry for name, layer in layers.items() if (entry := _groups_of(name, layer, train)) is not None]
    if not groups:
        raise ModelError(
            f"None of the {len(layers)} factorized layers of {type(model).__name__} has two factors that train, so none "
            f"could be frozen while another trains. Leave Freeze out, or let them train: requires_grad_(True)."
        )
    in_optimizer = []
    for entry in groups:
        is_held = [id(weight) in held for weight in entry.scheduled]
        if all(is_held):
            in_optimizer.append(entry)
        elif any(is_held):
            raise OptimizerError(
                f"The optimizer holds {sum(is_held)} of the {len(is_held)} factors of {entry.name!r} that train, so they "
                f"have no common step after which they could take turns. Put them into one optimizer."
            )
    if not in_optimizer:
        raise OptimizerError(
            f"The optimizer holds no factor of {type(model).__name__}: it trains another model, perhaps the one before a "
            f"rewrite. Pass the optimizer that trains this model; if there are several, make one Freeze for each."
        )
    return in_optimizer


def _groups_of(name: str, layer: Factorized, train: Train) -> FactorGroups | None:
    """Return a layer's groups, or None if nothing could be frozen while something trains."""
    weights, kernel, frozen = layer.weights, frozenset({layer.kernel_index}), frozen_indices(layer)
    trains = frozenset(index for index, weight in enumerate(weights) if weight.requires_grad or index in frozen)
    wanted: dict[Train, list[frozenset[int]]] = {
        "alternate": [kernel, trains - kernel],
        "each": [frozenset({index}) for index in sorted(trains)],
        "kernel": [kernel],
        "others": [trains - kernel],
    }
    groups = tuple(group & trains for group in wanted[train] if group & trains)
    kept = frozenset(range(len(weights))) - trains
    return FactorGroups(name, layer, weights, groups, kept) if groups and groups != (trains,) else None

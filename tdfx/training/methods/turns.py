"""Which factors of a layer train together, and which of them have their turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tdfx.errors import ModelError, OptimizerError
from tdfx.layers.factorized import Factorized
from tdfx.layers.frozen import frozen_factors, frozen_indices

Train = Literal["alternate", "each", "kernel", "others"]
"""Which factors of a layer train: the one with the kernel and the others by turns, each one by turns, or always the same."""


@dataclass(frozen=True, slots=True)
class Turns:
    """A layer whose factors train by turns."""

    name: str
    """Where the layer stands in the model."""
    layer: Factorized
    weights: tuple[nn.Parameter, ...]
    """The factors' weights, as the optimizer holds them."""
    groups: tuple[frozenset[int], ...]
    """The factors that train together, by their indices, in the order of their turns."""
    kept: frozenset[int]
    """Those that the user froze."""

    @property
    def scheduled(self) -> tuple[nn.Parameter, ...]:
        """The weights that have a turn."""
        return tuple(self.weights[index] for index in sorted(frozenset().union(*self.groups)))

    def take(self, turn: int) -> bool:
        """Let one group train and the others rest; return whether anything changed."""
        return self._rest(frozenset(range(len(self.weights))) - self.groups[turn % len(self.groups)] - self.kept)

    def end(self) -> bool:
        """Let all train; return whether anything changed."""
        return self._rest(frozenset())

    def resting(self) -> tuple[str, ...]:
        """Return the names of the parameters that rest."""
        stem = f"{self.name}." if self.name else ""
        return tuple(f"{stem}factors.{index}.weight" for index in sorted(frozen_indices(self.layer)))

    def _rest(self, wanted: frozenset[int]) -> bool:
        record = frozen_factors(self.layer)
        now = record.indices
        for index in now - wanted:
            self.weights[index].requires_grad_(True)
        # What the user froze in the meantime is not ours to thaw later.
        fresh = frozenset(index for index in wanted - now if self.weights[index].requires_grad)
        for index in fresh:
            self.weights[index].requires_grad_(False)
            # Or the optimizer would go on to use it.
            self.weights[index].grad = None
        record.indices = (now & wanted) | fresh
        return record.indices != now


def turns_of(model: nn.Module, train: Train, held: Iterable[nn.Parameter]) -> list[Turns]:
    """Return the layers of a model whose factors can train by turns; nothing is changed.

    Args:
        model: The model.
        train: Which factors train together.
        held: What the optimizer trains.

    Raises:
        ModelError: The model has no factorized layer, or of none do two factors train.
        OptimizerError: The optimizer holds some of a layer's factors and not the others, or holds none at all.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, Factorized)}
    if not layers:
        raise ModelError(
            f"{type(model).__name__} holds no factorized layer whose factors could train by turns. Pass the model that "
            f"tdfx.rewrite returned, and make this anew after each rewrite."
        )
    known = {id(one) for one in held}
    found = [one for name, layer in layers.items() if (one := _turns(name, layer, train)) is not None]
    if not found:
        raise ModelError(
            f"Of none of the {len(layers)} factorized layers of {type(model).__name__} do two factors train, so none could "
            f"rest while another does. Leave this out, or let them train: requires_grad_(True)."
        )
    mine = []
    for one in found:
        here = [id(weight) in known for weight in one.scheduled]
        if any(here) and not all(here):
            raise OptimizerError(
                f"The optimizer holds {sum(here)} of the {len(here)} factors of {one.name!r} that train, so they have no "
                f"step together after which they could take turns. Put them into one optimizer."
            )
        mine += [one] if all(here) else []
    if not mine:
        raise OptimizerError(
            f"The optimizer holds no factor of {type(model).__name__}: it trains another model, perhaps the one from before "
            f"a rewrite. Pass the optimizer that trains this one; for several, make one Freeze each."
        )
    return mine


def _turns(name: str, layer: Factorized, train: Train) -> Turns | None:
    """Return a layer's turns, or None where nothing could rest."""
    weights, kernel = layer.weights, frozenset({layer.kernel_index})
    trains = frozenset(
        index for index, one in enumerate(weights) if one.requires_grad or index in frozen_indices(layer)
    )
    groups: dict[Train, list[frozenset[int]]] = {
        "alternate": [kernel, trains - kernel],
        "each": [frozenset({index}) for index in sorted(trains)],
        "kernel": [kernel],
        "others": [trains - kernel],
    }
    left = tuple(group & trains for group in groups[train] if group & trains)
    if not left or left == (trains,):
        return None
    return Turns(name, layer, weights, left, frozenset(range(len(weights))) - trains)

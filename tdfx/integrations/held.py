"""Layers of a model that other callbacks of a trainer hold, such as those that Lightning's ``ModelPruning`` prunes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from tdfx.errors import TdfxWarning
from tdfx.kinds.registry import is_candidate
from tdfx.layers.holders import Held, search


def held_layers(holders: Iterable[object], model: nn.Module) -> Iterator[tuple[object, Held]]:
    """Yield the objects that hold layers of a model which could be rewritten, and where each layer is."""
    layers = {id(module) for module in model.modules() if is_candidate(module)}
    for holder in holders:
        for name, value in vars(holder).items():
            yield from ((holder, held) for held in search(value, name) if id(held.value) in layers)


def warn_of_held(held: Sequence[tuple[object, Held]], model: nn.Module) -> None:
    """Warn of layers that are no longer in the model, because factors have replaced them."""
    present = set(map(id, model.modules()))
    left = [(holder, each) for holder, each in held if id(each.value) not in present]
    if left:
        holder, first = left[0]
        warnings.warn(
            f"{type(holder).__name__} holds {len(left)} layers that factors have replaced, {first.path} for example, and "
            f"goes on with the old ones, which nothing trains. Keep them, Policy(exclude=...), or use it after the merge.",
            TdfxWarning,
            stacklevel=2,
        )

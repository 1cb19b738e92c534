"""Averages of a model over its training (EMA, SWA), which go along when its weights turn into factors, and back.

The average gets factors in the model's own bases: of each site's factors one is fitted to the averaged weight by least
squares, and the others are the model's. Split by itself, the average would get factors with other signs and turned bases,
and to go on averaging those with the model's would destroy both.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.errors import ModelError
from tdfx.optim.surgery import Exchange
from tdfx.ranks.spectrum import working_dtype
from tdfx.wrappers import Wrapped, unwrap


@dataclass(frozen=True, slots=True)
class Averaged:
    """An average and the model that it is an average of, found to go together."""

    holder: Any
    """What holds the averaged copy as ``module``."""
    inside: Wrapped
    """The averaged copy."""

    @torch.no_grad()
    def follow(self, model: nn.Module, made: nn.Module, exchanges: Sequence[Exchange]) -> nn.Module:
        """Return what the average is to hold once its model has become another; nothing is changed.

        Args:
            model: The model of before.
            made: What came of it; what both share is the same objects in both.
            exchanges: What leaves the model and what takes its place.
        """
        names = _names(model)
        own = _tensors(self.inside.model)
        twin = copy.deepcopy(made)
        values: dict[int, Tensor] = {}
        for exchange in exchanges:
            before = [cast("nn.Parameter", own[names[id(one)]]) for one in exchange.old]
            wide = tuple(one.detach().to(working_dtype(one)) for one in before)
            # The factors of the model may be on another device than the average.
            moved = tuple(one.to(exchange.new[0].device) for one in wide)
            for parameter, value in zip(exchange.new, exchange.carrier.iterate(moved), strict=True):
                like = torch.empty_like(parameter, device=before[0].device, dtype=before[0].dtype, requires_grad=False)
                values[id(parameter)] = nn.Parameter(like.copy_(value), requires_grad=before[0].requires_grad)
        for new, old in zip(twin.modules(), made.modules(), strict=True):
            for name, held in old._parameters.items():
                if held is not None:
                    kept = names.get(id(held))
                    new._parameters[name] = cast("nn.Parameter", values[id(held)] if kept is None else own[kept])
            for name, buffer in old._buffers.items():
                if id(buffer) in names:
                    new._buffers[name] = own[names[id(buffer)]]
        return self.inside.wrap(twin.train(self.inside.model.training))


def as_averages(averaged: Any, wrapped: Wrapped) -> tuple[Averaged, ...]:
    """Return the averages that were passed, each found to be one of this model.

    Raises:
        ModelError: One holds no averaged copy, or a copy of another model; or the model is sharded.
    """
    given = list(averaged) if isinstance(averaged, list | tuple) else [] if averaged is None else [averaged]
    if given and wrapped.shards:
        raise ModelError(
            "averaged= does not go with a model that fully_shard was called on: an average in shards has no way to its "
            "factors yet. Make the average anew from the returned model."
        )
    return tuple(_checked(one, wrapped.model) for one in given)


def _checked(holder: Any, model: nn.Module) -> Averaged:
    inside = getattr(holder, "module", None)
    if not isinstance(inside, nn.Module):
        raise ModelError(
            f"averaged={type(holder).__name__} holds no averaged copy of the model as .module. Pass a "
            f"torch.optim.swa_utils.AveragedModel, or anything that keeps the copy under that name."
        )
    found = unwrap(inside)
    mine = {name: tuple(one.shape) for name, one in _tensors(model).items()}
    theirs = {name: tuple(one.shape) for name, one in _tensors(found.model).items()}
    if mine != theirs:
        odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        raise ModelError(
            f"The averaged copy in {type(holder).__name__} is not one of this model: {odd[0]!r} is {theirs.get(odd[0])} "
            f"there and {mine.get(odd[0])} in the model. Pass the average that goes with the model as it is now; it must "
            f"have been rewritten along with it."
        )
    return Averaged(holder, found)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: one for each in named for name, one in each}


def _names(model: nn.Module) -> dict[int, str]:
    """Return a name of each parameter and buffer by its identity."""
    return {id(one): name for name, one in _tensors(model).items()}

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

from tdfx.distributed.processes import Processes
from tdfx.errors import ModelError
from tdfx.layers.factorized import kernel_factor, like_parameter
from tdfx.layers.placement import full, shard_like
from tdfx.optim.surgery import Exchange
from tdfx.ranks.spectrum import working_dtype
from tdfx.wrappers.unwrap import Wrapped, unwrap


@dataclass(frozen=True, slots=True)
class Averaged:
    """An average and the model that it is an average of, found to go together."""

    holder: Any
    """What holds the averaged copy as ``module``."""
    inside: Wrapped
    """The averaged copy."""

    @torch.no_grad()
    def follow(
        self, model: nn.Module, made: nn.Module, exchanges: Sequence[Exchange], processes: Processes
    ) -> nn.Module:
        """Return what the average is to hold once its model has become another; nothing is changed.

        Args:
            model: The model of before.
            made: What came of it; what both share is the same objects in both.
            exchanges: What leaves the model and what takes its place.
            processes: The processes that train the model.
        """
        names = _names(model)
        own = _tensors(self.inside.model)
        twins: dict[int, Any] = {key: own[name] for key, name in names.items()}
        for exchange in exchanges:
            before = [cast("nn.Parameter", own[names[id(one)]]) for one in exchange.old]
            values = exchange.carrier.iterate(tuple(_wide(one) for one in before))
            processes.broadcast_tensors(values)
            like = kernel_factor(before)
            for parameter, value in zip(exchange.new, values, strict=True):
                placed = shard_like(like_parameter(value, like), like)
                twins[id(parameter)] = nn.Parameter(placed, requires_grad=like.requires_grad)
        # What is found in the memo is not copied, so the average shares no tensor with the model, and none is made in vain.
        twin = copy.deepcopy(made, twins)
        return self.inside.wrap(twin.train(self.inside.model.training))


def _wide(tensor: Tensor) -> Tensor:
    """Return all the values of a tensor in the dtype in which they are worked with."""
    values = full(tensor)
    return values.to(working_dtype(values))


def holders_of(averaged: Any) -> list[Any]:
    """Return what was passed as averages, each found to hold a model.

    Raises:
        ModelError: One holds no averaged copy.
    """
    given = list(averaged) if isinstance(averaged, list | tuple) else [] if averaged is None else [averaged]
    for holder in given:
        if not isinstance(getattr(holder, "module", None), nn.Module):
            raise ModelError(
                f"averaged={type(holder).__name__} holds no averaged copy of the model as .module. Pass a "
                f"torch.optim.swa_utils.AveragedModel, or anything that keeps the copy under that name."
            )
    return given


def averaged_of(holder: Any, model: nn.Module) -> Averaged:
    """Return an average, found to be one of this model.

    Raises:
        ModelError: It is an average of another model.
    """
    found = unwrap(holder.module)
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

"""Averages of a model over its training (EMA, SWA), rewritten and merged along with the model.

The factors of the average have the same bases as the model's: of each site, one factor is fitted to the averaged weight by
least squares, and the others are copies of the model's. If the averaged weight were decomposed by itself, its factors could
have other signs and rotated bases, and averaging them with the model's factors later would destroy both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.distributed.processes import Processes
from tdfx.errors import ModelError
from tdfx.layers.factorized import kernel_factor, new_parameter
from tdfx.layers.paths import parameters_by_path
from tdfx.layers.placement import full_precise
from tdfx.optim.carriers import carry
from tdfx.optim.surgery import Exchange
from tdfx.wrappers.unwrap import Unwrapped, unwrap


@dataclass(frozen=True, slots=True)
class Average:
    """An averaged copy of a model, and the object that holds it."""

    holder: Any
    """The object that has the averaged copy as its attribute ``module``."""
    unwrapped: Unwrapped
    """The averaged copy."""

    def tensors(self) -> Iterable[Tensor]:
        """Return the parameters and buffers of the averaged copy."""
        return _tensors(self.unwrapped.model).values()

    @torch.no_grad()
    def convert(
        self, model: nn.Module, rewritten: nn.Module, exchanges: Sequence[Exchange], processes: Processes
    ) -> nn.Module:
        """Return the averaged copy of a rewritten model; nothing is changed.

        Args:
            model: The model before the rewrite, of which this is the average.
            rewritten: The model after the rewrite; it shares with ``model`` the parameters that were not exchanged.
            exchanges: The parameters that were exchanged.
            processes: The processes that train the model.
        """
        names = {id(tensor): name for name, tensor in _tensors(model).items()}
        averaged = _tensors(self.unwrapped.model)
        # Parameter or buffer of the rewritten model, by id -> its average.
        averages: dict[int, Any] = {key: averaged[name] for key, name in names.items()}
        for exchange in exchanges:
            old = [cast("nn.Parameter", averaged[names[id(parameter)]]) for parameter in exchange.old]
            values = carry(exchange.carriers, "iterate", tuple(map(full_precise, old)))
            processes.broadcast_tensors(values)
            template = kernel_factor(old)
            for parameter, value in zip(exchange.new, values, strict=True):
                averages[id(parameter)] = new_parameter(value, template)
        # deepcopy takes the tensors from its memo, so the average shares none with the model, and none is copied.
        converted = copy.deepcopy(rewritten, averages)
        return self.unwrapped.wrap(converted.train(self.unwrapped.model.training))


def as_holders(averaged: Any) -> list[Any]:
    """Return the argument ``averaged`` as a list of objects that hold an averaged copy.

    Raises:
        ModelError: One of them holds no averaged copy.
    """
    holders = list(averaged) if isinstance(averaged, list | tuple) else [] if averaged is None else [averaged]
    for holder in holders:
        if not isinstance(getattr(holder, "module", None), nn.Module):
            raise ModelError(
                f"averaged={type(holder).__name__} holds no averaged copy of the model as .module. Pass a "
                f"torch.optim.swa_utils.AveragedModel, or anything that keeps the copy under that name."
            )
    return holders


def as_average(holder: Any, model: nn.Module) -> Average:
    """Return the average that an object holds of a model.

    Raises:
        ModelError: It is an average of another model.
    """
    unwrapped = unwrap(holder.module)
    expected, shapes = (
        {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()} for module in (model, unwrapped.model)
    )
    if odd := min((name for name, _ in expected.items() ^ shapes.items()), default=None):
        raise ModelError(
            f"The averaged copy in {type(holder).__name__} is not one of this model: {odd!r} is {shapes.get(odd)} "
            f"there and {expected.get(odd)} in the model. Pass the average that goes with the model as it is now; it "
            f"must have been rewritten along with it."
        )
    return Average(holder, unwrapped)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name; shared ones by each of their names."""
    return dict([*parameters_by_path(model, remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])

"""What goes along with a model when another one takes its place: optimizers, gradients, averages, masters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tdfx.errors import TdfxWarning
from tdfx.layers.placement import own_attributes
from tdfx.optim.averages import Averaged, averaged_of, holders_of
from tdfx.optim.gradients import carry_gradients
from tdfx.optim.masters import Masters, as_masters
from tdfx.optim.surgery import Exchange, as_optimizers, check_homes, prepare
from tdfx.wrappers.unwrap import Wrapped


@dataclass(frozen=True, slots=True)
class Companions:
    """A model and all that goes along with it when it becomes another."""

    wrapped: Wrapped
    optimizers: tuple[Optimizer, ...]
    averages: tuple[Averaged, ...]
    masters: Masters

    @classmethod
    def of(cls, wrapped: Wrapped, optimizer: Any, averaged: Any, masters: Any) -> Companions:
        """Take what was passed with a model, found to belong to it."""
        optimizers, holders = as_optimizers(optimizer), holders_of(averaged)
        found = as_masters(masters, wrapped.model, shards=wrapped.shards)
        # Before anything is done for any of them, which the processes may have to do together.
        wrapped.processes.check_same(
            (len(optimizers), [type(one.module).__name__ for one in holders], len(found.pairs)),
            "The processes pass different optimizers, averages or masters to tdfx. Pass as many, of the same, on each.",
        )
        return cls(wrapped, optimizers, tuple(averaged_of(one, wrapped.model) for one in holders), found)

    def prepare(
        self, made: nn.Module, found: list[Exchange], *, values: bool = True, warn: bool = False
    ) -> Callable[[], nn.Module]:
        """Work out all that goes along to another model; of what was passed, nothing is changed.

        Args:
            made: What came of the model, or of its masters.
            found: What leaves it, and what comes.
            values: Whether what comes has values.
            warn: Whether to warn of what is left behind.

        Returns:
            What changes all that was passed and returns the other model, wrapped as the first was; it cannot fail.
        """
        sides = self.masters.sides(found, self.optimizers)
        if warn:
            _warn_of_lost_attachments(sides.model)
        if warn and not self.optimizers:
            _warn_of_missing_optimizer(sides.model)
        check_homes(self.optimizers, sides.optimizer)
        processes = self.wrapped.processes
        processes.raise_pending()
        surgery = prepare(self.optimizers, sides.optimizer)
        processes.broadcast_tensors(surgery.tensors())
        if values:
            carry_gradients(sides.every)
        self.masters.without_masters(made, sides)
        followers = [one.follow(self.wrapped.model, made, sides.model, processes) for one in self.averages]
        result = self.wrapped.wrap(made)

        def commit() -> nn.Module:
            surgery.commit()
            self.masters.commit()
            for average, follower in zip(self.averages, followers, strict=True):
                average.holder.module = follower
            return result

        return commit


def _warn_of_lost_attachments(exchanges: Sequence[Exchange]) -> None:
    """Warn where a weight carries hooks or attributes of the user's, which no factor can take over."""
    for one in exchanges:
        names = ("_backward_hooks", "_post_accumulate_grad_hooks")
        if any(own_attributes(weight) or any(getattr(weight, name, None) for name in names) for weight in one.old):
            warnings.warn(
                f"The weight of site {one.site!r} has hooks or attributes of its own, which its factors do not get. Keep "
                f"the site, exclude=({one.site!r},), or attach them anew.",
                TdfxWarning,
                stacklevel=4,
            )


def _warn_of_missing_optimizer(exchanges: Sequence[Exchange]) -> None:
    trained = [one.site for one in exchanges if any(weight.grad is not None for weight in one.old)]
    if trained:
        warnings.warn(
            f"No optimizer= was given, but the weights of {len(trained)} rewritten sites have gradients, {trained[0]!r} "
            f"first: the optimizer that trains them would go on with the old weights and never see the factors. Pass "
            f"optimizer=..., or make a new optimizer from the returned model's parameters.",
            TdfxWarning,
            stacklevel=4,
        )

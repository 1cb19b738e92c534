"""Optimizers, gradients, averages and masters: all that follows a model through a rewrite or a merge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tdfx.errors import OptimizerError, TdfxWarning
from tdfx.layers.placement import full_precise, shard_like, user_attributes
from tdfx.optim.averages import Average, as_average, as_holders
from tdfx.optim.carriers import carry
from tdfx.optim.copies import untrained_copies
from tdfx.optim.inner import check_holders, with_inner
from tdfx.optim.left_behind import LeftBehind, watch_steps
from tdfx.optim.masters import Masters, as_masters
from tdfx.optim.strangers import models_that_share
from tdfx.optim.surgery import Exchange, as_optimizers, check_groups, check_states, prepare_surgery
from tdfx.wrappers.unwrap import Unwrapped


@dataclass(frozen=True, slots=True)
class Companions:
    """A model with its optimizers, averages and masters, which all change when another model takes its place."""

    unwrapped: Unwrapped
    optimizers: tuple[Optimizer, ...]
    averages: tuple[Average, ...]
    masters: Masters
    carry_state: bool | None = None
    """As in ``rewrite``."""

    @classmethod
    def of(
        cls, unwrapped: Unwrapped, optimizer: Any, averaged: Any, masters: Any, *, carry_state: bool | None = None
    ) -> Companions:
        """Check that the arguments of ``rewrite`` or ``merge`` belong to the model, and return them together.

        Raises:
            ModelError: An average belongs to another model, or the processes pass different arguments.
            OptimizerError: An optimizer cannot be carried over, or the masters do not go with the model.
        """
        if not (carry_state is None or isinstance(carry_state, bool)):
            raise OptimizerError(
                f"carry_state={carry_state!r} is none of True, False and None: it says whether factors take over the state "
                f"that the optimizer keeps of their weight. Leave it out for what was measured to be best."
            )
        optimizers, holders = with_inner(as_optimizers(optimizer)), as_holders(averaged)
        checked_masters = as_masters(masters, unwrapped.model, shards=unwrapped.shards)
        # Before the averages are unwrapped, which the processes may have to do together.
        unwrapped.processes.check_same(
            (
                len(optimizers),
                carry_state,
                [type(holder.module).__name__ for holder in holders],
                len(checked_masters.pairs),
            ),
            "The processes pass different optimizers, averages or masters to tdfx. Pass as many, of the same, on each.",
        )
        averages = tuple(as_average(holder, unwrapped.model) for holder in holders)
        return cls(unwrapped, optimizers, averages, checked_masters, carry_state)

    def prepare(
        self, rewritten: nn.Module, exchanges: list[Exchange], *, values: bool = True, warn: bool = False
    ) -> Callable[[], nn.Module]:
        """Work out all changes for a rewritten or merged model, without making any yet.

        Args:
            rewritten: The model after the rewrite or merge; where there are masters, it holds these.
            exchanges: The parameters that left the model and those that replace them.
            values: Whether the new parameters have values.
            warn: Whether to warn of an optimizer that is missing, and of copies that the model keeps of its weights.

        Returns:
            A function that makes all changes and returns the model in the wrappers of the old one. It cannot fail.
        """
        sides = self.masters.both_sides(exchanges, self.optimizers)
        check_groups(self.optimizers, sides.optimizer)
        leaving = {f"the weight of site {exchange.site!r}": exchange.old for exchange in sides.optimizer}
        check_holders(self.optimizers, leaving, self.unwrapped.staying)
        check_states(self.optimizers, sides.optimizer)
        for text in self._losses(sides.model, rewrites=warn):
            warnings.warn(text, TdfxWarning, stacklevel=4)
        processes = self.unwrapped.processes
        processes.raise_pending()
        surgery = prepare_surgery(self.optimizers, sides.optimizer, carry_state=self.carry_state)
        processes.broadcast_tensors(surgery.tensors())
        if values:
            _carry_gradients({id(exchange): exchange for exchange in sides.optimizer + sides.model}.values())
        self.masters.remove_masters(rewritten, sides)
        model = self.unwrapped.model
        new_averages = [average.convert(model, rewritten, sides.model, processes) for average in self.averages]
        result = self.unwrapped.wrap(rewritten)

        left_behind = self._left_behind(sides.model, "rewrite" if warn else "merge")

        def commit() -> nn.Module:
            surgery.commit()
            if left_behind is not None:
                watch_steps(left_behind)
            self.masters.commit()
            for average, module in zip(self.averages, new_averages, strict=True):
                average.holder.module = module
            return result

        return commit

    def _left_behind(self, exchanges: Sequence[Exchange], verb: str) -> LeftBehind | None:
        """Return what an optimizer that was not given may go on with; None where that is known, or was said already."""
        old = [parameter for exchange in exchanges for parameter in exchange.old]
        said = verb == "rewrite" and any(parameter.grad is not None for parameter in old)
        # fully_shard makes other parameters of the new ones.
        if self.optimizers or self.unwrapped.shards or said or not old:
            return None
        return LeftBehind(old, (parameter for exchange in exchanges for parameter in exchange.new), verb)

    def _losses(self, exchanges: Sequence[Exchange], *, rewrites: bool) -> Iterator[str]:
        """Yield a warning for each thing that does not go along: hooks of parameters; at a rewrite, optimizer and copies."""
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        for exchange in exchanges:
            hooked = any(getattr(weight, name, None) for name in hooks for weight in exchange.old)
            if hooked or any(map(user_attributes, exchange.old)):
                whose, what = ("The weight", "its factors do") if rewrites else ("A factor", "the merged weight does")
                keep = f"Keep the site, exclude=({exchange.site!r},), or attach" if rewrites else "Attach"
                yield (
                    f"{whose} of site {exchange.site!r} has hooks or attributes of its own, which {what} not get. {keep} "
                    f"them anew."
                )
        trained = [exchange.site for exchange in exchanges if any(weight.grad is not None for weight in exchange.old)]
        if rewrites and trained and not self.optimizers:
            yield (
                f"No optimizer= was given, but the weights of {len(trained)} rewritten sites have gradients, {trained[0]!r} "
                f"first: the optimizer that trains them would go on with the old weights and never see the factors. Pass "
                f"optimizer=..., or make a new optimizer from the returned model's parameters."
            )
        dense = {exchange.site: exchange.old[0] for exchange in exchanges if rewrites and len(exchange.old) == 1}
        around = self.unwrapped.surroundings
        model = self.unwrapped.model if around is None else around.whole
        weights = {id(weight): site for site, weight in dense.items()}
        other, shared = next(models_that_share(model, weights, () if self.masters else self.optimizers), (None, ""))
        if other is not None:
            yield (
                f"Another model, a {type(other).__name__}, holds the weight of site {shared!r} too and is trained by the "
                f"same optimizer. It would keep the old weight, which nothing trains any more. Rewrite both in one module, "
                f"such as nn.ModuleList([first, second]), or keep the site: exclude=({shared!r}, ...)."
            )
        followed = {id(tensor) for average in self.averages for tensor in average.tensors()}
        if copies := list(untrained_copies(model, dense, () if self.masters else self.optimizers, followed)):
            path, site = copies[0]
            yield (
                f"The model holds {len(copies)} copies of weights that will be factorized, and does not train them, as a "
                f"momentum encoder or a moving average: {path!r} of site {site!r} first. They stay dense, so an update that "
                f"goes through both side by side would fail or pair the wrong ones. Keep these sites, "
                f"exclude=({site!r}, ...), or make the copies anew from the returned model."
            )


@torch.no_grad()
def _carry_gradients(exchanges: Iterable[Exchange]) -> None:
    """Give new parameters gradients computed from those of the parameters that they replace, which keep their own.

    To factors they are carried by the chain rule, so gradients accumulated before and after the rewrite add up to what
    the factors would have accumulated from the start. To a dense weight, the gradient of least norm is taken that the
    chain rule carries to the factors' gradients.
    """
    for exchange in exchanges:
        if any(parameter.grad is not None for parameter in exchange.old):
            old = (torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in exchange.old)
            gradients = carry(exchange.carriers, "first", tuple(map(full_precise, old)))
            for parameter, gradient in zip(exchange.new, gradients, strict=True):
                if parameter.requires_grad:
                    placed = shard_like(gradient.to(parameter.dtype), parameter)
                    parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(placed)

"""``Rewarm``: a short re-warm-up of learning rates after a switch, independent of the scheduler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from tdfx.checks import check_share, check_whole
from tdfx.errors import OptimizerError, PolicyError
from tdfx.training.methods.step_hooks import read_state, remove_within_step


class Rewarm:
    """Scales the learning rates of an optimizer for some steps, linearly from ``start`` to 1.

    It acts only during ``optimizer.step()``: before and after, each group's ``lr`` is what the scheduler set. After its last
    step it removes itself. If a step raises, the rates are restored before the next one.

    Args:
        optimizer: Any optimizer whose groups have an ``lr``, a number or a tensor.
        steps: Optimizer steps until the full rate, at least 1.
        start: Factor at the first step, in (0, 1].

    Raises:
        PolicyError: A number is out of range.
        OptimizerError: A group of the optimizer has no ``lr``.

    Example:
        >>> import tdfx, torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
        >>> rewarm = tdfx.Rewarm(optimizer, 4, start=0.2)
        >>> rewarm.factor, optimizer.param_groups[0]["lr"]
        (0.2, 0.5)
    """

    def __init__(self, optimizer: Optimizer, steps: int, *, start: float = 0.1) -> None:
        check_whole("steps", steps, "the optimizer steps until the full rate", "steps=200")
        check_share("start", start, "the factor on the learning rates at the first step", "Pass for example start=0.1.")
        check_rates(optimizer)
        self.steps = steps
        self.start = start
        self._taken = 0
        self._scaled: list[tuple[dict[str, Any], Any, Any]] = []  # group, its rate, its scaled rate
        before = optimizer.register_step_pre_hook(self._before_step)
        # Other hooks before a step, such as FrobeniusDecay's, must see the rates that the step will use.
        cast("OrderedDict[int, Any]", optimizer._optimizer_step_pre_hooks).move_to_end(before.id, last=False)
        self._handles = [before, optimizer.register_step_post_hook(self._after_step)]

    @property
    def done(self) -> bool:
        """True after the last step or after ``remove``."""
        return not self._handles

    @property
    def factor(self) -> float:
        """The factor on the learning rates at the next step."""
        return 1.0 if self.done else self.start + (1 - self.start) * self._taken / self.steps

    def remove(self) -> None:
        """End the re-warm-up: steps use the full rates from now on."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the steps taken, in plain types."""
        return {"steps": self.steps, "start": self.start, "taken": self._taken, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            PolicyError: It is no state of a Rewarm, or one with other settings.
        """
        taken, done = read_state("Rewarm", state, {"steps": self.steps, "start": self.start}, most=self.steps)
        if self.done and not done:
            raise PolicyError(
                "This Rewarm has ended, and the state is of one that has not. Make a new Rewarm, then load the state."
            )
        self._restore()
        self._taken = taken
        if done:
            self.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        seen: set[int] = set()
        for group in optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor):
                group["lr"] = rate * self.factor
                self._scaled.append((group, rate, group["lr"]))
            elif id(rate) not in seen:  # groups may share a tensor
                # In place, because a captured or compiled step reads the same tensor again.
                self._scaled.append((group, rate.clone(), rate.mul_(self.factor).clone()))
                seen.add(id(rate))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.done:
            return
        self._restore()
        self._taken += 1
        if self._taken >= self.steps:
            before, after = self._handles
            before.remove()
            remove_within_step(after, optimizer)
            self._handles = []

    @torch.no_grad()
    def _restore(self) -> None:
        """Restore the rates of the groups, except those that were set to another value since."""
        for group, old, scaled in self._scaled:
            rate = group["lr"]
            if isinstance(rate, Tensor) and isinstance(scaled, Tensor):
                if torch.equal(rate, scaled.to(rate.device)):
                    rate.copy_(old)
            elif not isinstance(rate, Tensor) and not isinstance(scaled, Tensor) and rate == scaled:
                group["lr"] = old
        self._scaled = []


def check_rates(optimizer: Optimizer) -> None:
    """Raise OptimizerError if a group of an optimizer has no learning rate."""
    if any("lr" not in group for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise OptimizerError(f"{name} has a group without 'lr', so there is no rate to warm up. Leave rewarm out.")

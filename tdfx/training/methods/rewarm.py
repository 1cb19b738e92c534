"""A short re-warm-up of learning rates after a switch, beside whatever scheduler there is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from tdfx.checks import check_whole, is_number
from tdfx.errors import OptimizerError, PolicyError
from tdfx.training.methods.hooks import leave_from_within


class Rewarm:
    """Scales the learning rates of an optimizer for some steps, linearly from ``start`` to 1.

    It acts during ``optimizer.step()`` only: before and after, each group's ``lr`` is what the scheduler set, so schedulers
    and logs see nothing of it. After its last step it is gone. If a step raises, the rates are put right before the next
    one.

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
        if not (is_number(start) and 0 < start <= 1):
            raise PolicyError(
                f"start={start!r} is not in (0, 1]: it is the factor on the learning rates at the first step. Pass for "
                f"example start=0.1."
            )
        check_rates(optimizer)
        self.steps = steps
        self.start = start
        self._taken = 0
        self._held: list[tuple[dict[str, Any], Any, Any]] = []
        before = optimizer.register_step_pre_hook(self._before_step)
        # What else acts before a step, such as another decay, is to see the rates that the step will use.
        cast("OrderedDict[int, Any]", optimizer._optimizer_step_pre_hooks).move_to_end(before.id, last=False)
        self._handles = [before, optimizer.register_step_post_hook(self._after_step)]

    @property
    def done(self) -> bool:
        """True after the last step, or once it was removed."""
        return not self._handles

    @property
    def factor(self) -> float:
        """The factor on the learning rates at the next step."""
        return 1.0 if self.done else self.start + (1 - self.start) * self._taken / self.steps

    def remove(self) -> None:
        """End the re-warm-up: from now on steps use the full rates."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return how far it has come, in plain types."""
        return {"steps": self.steps, "start": self.start, "taken": self._taken, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave.

        Raises:
            PolicyError: It is the state of something else, or of other settings.
        """
        found = dict(state) if isinstance(state, Mapping) else {}
        own = {"steps": self.steps, "start": self.start}
        taken = found.get("taken")
        if {key: found.get(key) for key in own} != own or not isinstance(taken, int) or not 0 <= taken <= self.steps:
            raise PolicyError(
                f"This is not the state of a Rewarm with steps={self.steps} and start={self.start}: {found!r}. Make it with "
                f"the settings that it was saved with."
            )
        if self.done and not found.get("done"):
            raise PolicyError(
                "This Rewarm has ended, and the state is of one that has not. Make it anew, then load the state."
            )
        self._restore()
        self._taken = taken
        if found.get("done"):
            self.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        factor = self.factor
        seen: set[int] = set()
        for group in optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, Tensor):
                # In place, since a captured or compiled step reads the tensor that it knows; groups may share one.
                if id(rate) not in seen:
                    seen.add(id(rate))
                    old = rate.clone()
                    self._held.append((group, old, rate.mul_(factor).clone()))
            else:
                group["lr"] = rate * factor
                self._held.append((group, rate, group["lr"]))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.done:
            return
        self._restore()
        self._taken += 1
        if self._taken >= self.steps:
            before, after = self._handles
            before.remove()
            leave_from_within(after, optimizer)
            self._handles = []

    @torch.no_grad()
    def _restore(self) -> None:
        """Give groups their rates back, unless another has set them since."""
        for group, old, scaled in self._held:
            now = group["lr"]
            if isinstance(now, Tensor) and isinstance(scaled, Tensor):
                if torch.equal(now, scaled.to(now.device)):
                    now.copy_(old)
            elif not isinstance(now, Tensor) and not isinstance(scaled, Tensor) and now == scaled:
                group["lr"] = old
        self._held = []


def check_rates(optimizer: Optimizer) -> None:
    """Raise OptimizerError if a group of an optimizer has no learning rate."""
    if any("lr" not in group for group in optimizer.param_groups):
        raise OptimizerError(
            f"{type(optimizer).__name__} has a group without 'lr', so there is no learning rate to warm up. Leave "
            f"rewarm out."
        )

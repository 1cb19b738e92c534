"""What a method of ``compare.py`` came to on one task from one seed: times in turns with the dense step, error, accuracy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_common import own_times
from compare_methods import Made, Method, quietly
from study_runs import FULL, ROUNDS, Study
from torch import nn
from torch.optim import Optimizer

from tdfx.cost.timing import take_turns

SLOWEST = 10.0
"""Dense steps that a step may take in a method that is trained to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one method came to."""

    task: str
    method: str
    seed: int
    torch: str
    """The version it ran with."""
    step: float = 1.0
    """Time of a step after the switch, in that of a dense one."""
    switch_steps: float = 0.0
    """What the switch took, in dense steps."""
    error: float = 0.0
    """Change of the outputs at the switch, on what is held out, relative to their norm."""
    parameters: float = 1.0
    """In those of the dense model."""
    accuracy: float = 0.0
    """Right answers on what is held out at the end, in percent."""
    loss: float = 0.0
    """Mean loss on it, in nats."""
    optimizer: str = "goes on"
    """What becomes of the optimizer's state."""
    failed: str = ""
    """The first line of the error it ended with."""


class Comparison(Study):
    """The methods on one task from one seed, from the same moment."""

    def outcomes(self, methods: Sequence[Method], share: float, *, dense: bool) -> list[Outcome]:
        """Switch, time and train on with each; where ``dense``, the model as it is too."""
        made: dict[str, Made] = {FULL: copy.deepcopy((self.start, self.optimizer))}
        known: dict[str, dict[str, Any]] = {FULL: {}}
        failed: dict[str, str] = {}
        for method in methods:
            try:
                made[method.name], known[method.name] = self._switched(method, share)
            except Exception as error:  # whatever the code of others raises is what came of it
                failed[method.name] = first_line(error)
        alive = [name for name in made if name not in failed]
        steps = [self._step(*copy.deepcopy(_with_optimizer(made[name], self))) for name in alive]
        timings = take_turns(steps, rounds=ROUNDS)
        dense_seconds = timings[0].seconds
        found = []
        for name, timing in zip(alive, timings, strict=True):
            if name != FULL or dense:
                took = known[name].pop("seconds", 0.0) / dense_seconds
                figures = {**known[name], "step": timing.seconds / dense_seconds, "switch_steps": took}
                found.append(self._to_the_end(name, made[name], figures))
        return [*found, *(self._outcome(name, failed=line) for name, line in failed.items())]

    def _switched(self, method: Method, share: float) -> tuple[Made, dict[str, Any]]:
        """Apply a method, and take one step with what it gave, on a copy."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        before = self._outputs(model)
        begin = self.clock()
        with own_times():
            small, kept = quietly(method.apply, model, optimizer, share, self.example)
        seconds = self.clock() - begin
        after = self._outputs(small)
        made: Made = (small.train(), kept)
        self._step(*copy.deepcopy(_with_optimizer(made, self)))()
        sizes = [sum(one.numel() for one in net.parameters()) for net in (small, self.start)]
        figures = {
            "seconds": seconds,
            "error": float((after - before).norm() / before.norm()),
            "parameters": sizes[0] / sizes[1],
            "optimizer": self._handling(small, kept),
        }
        return made, figures

    def _handling(self, model: nn.Module, optimizer: Optimizer | None) -> str:
        """Say for how much of the model's parameters an optimizer that goes on has state."""
        if optimizer is None:
            return "new, state lost"
        having = sum(one.numel() for one in model.parameters() if optimizer.state.get(one))
        share = having / sum(one.numel() for one in model.parameters())
        return "carried" if share == 1 else f"goes on, state of {share:.0%}"

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model.eval()(part) for part in torch.split(self.task.held_out()[0], 256)])

    def _to_the_end(self, name: str, made: Made, figures: dict[str, Any]) -> Outcome:
        model, optimizer = _with_optimizer(made, self)
        if figures["step"] > SLOWEST:
            return self._outcome(name, failed=f"its step takes {figures['step']:.0f} dense ones", **figures)
        try:
            self._train(model.train(), optimizer, range(self.switch, self.steps))
            accuracy, loss = self.task.score(model)
        except Exception as error:  # as above
            return self._outcome(name, failed=first_line(error), **figures)
        return self._outcome(name, accuracy=accuracy, loss=loss, **figures)

    def _outcome(self, name: str, **figures: Any) -> Outcome:
        return Outcome(task=self.task.name, method=name, seed=self.seed, torch=torch.__version__, **figures)


def _with_optimizer(made: Made, study: Comparison) -> tuple[nn.Module, Optimizer]:
    model, optimizer = made
    return model, study.task.optimizer(model.parameters()) if optimizer is None else optimizer


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of what it says.

    >>> first_line(TypeError("no\\nwhy"))
    'TypeError: no'
    """
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

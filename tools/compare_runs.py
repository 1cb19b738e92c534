"""Run a method of ``compare.py`` on one task with one seed: step times in turns with the dense step, error, accuracy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_common import Clock, separate_times
from compare_methods import Continuation, Method, apply_quietly
from study_data import train_step
from study_runs import FULL
from study_tasks import StudyTask
from torch import nn
from torch.optim import Optimizer

from tdfx.cost.timing import take_turns

SWITCH_AT = 0.2
"""Share of the steps after which a method is applied."""
ROUNDS = 5
"""Steps of each model that are timed in turns."""
SLOWEST = 10.0
"""Most dense steps that a step may take for a method to be trained to the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodResult:
    """The results of one method."""

    task: str
    method: str
    seed: int
    torch: str
    """The version that it ran with."""
    step: float = 1.0
    switch_steps: float = 0.0
    """Times of a step after the switch and of the switch, both in dense steps."""
    error: float = 0.0
    """Change of the held-out outputs at the switch, relative to their norm."""
    parameters: float = 1.0
    """Number of parameters, relative to the dense model."""
    accuracy: float = 0.0
    loss: float = 0.0
    """Both on the held-out data at the end, in percent and in nats."""
    optimizer: str = "goes on"
    """What happens to the optimizer's state."""
    failed: str = ""
    """The first line of the error that it ended with."""


class MethodStudy:
    """The methods on one task with one seed, from the same trained state."""

    def __init__(self, task: StudyTask, seed: int, steps: int, clock: Clock) -> None:
        """Train up to the switch."""
        self.task, self.seed, self.steps, self.clock = task, seed, steps, clock
        self.switch = max(1, round(SWITCH_AT * steps))
        torch.manual_seed(seed)
        self.start = task.model().train()
        self.optimizer = task.optimizer(self.start.parameters())
        self.example = next(task.data(seed))
        self.train(self.start, self.optimizer, range(self.switch))

    def results(self, methods: Sequence[Method], share: float, *, dense: bool) -> list[MethodResult]:
        """Switch, time and train on with each method, and if ``dense`` with the dense model too."""
        continuations: dict[str, Continuation] = {FULL: copy.deepcopy((self.start, self.optimizer))}
        figures: dict[str, dict[str, Any]] = {FULL: {"switch_steps": 0.0}}
        failures: list[MethodResult] = []
        for method in methods:
            try:
                continuations[method.name], figures[method.name] = self._apply(method, share)
            except Exception as error:  # the other packages may raise anything, and that is their result
                failures.append(self._method_result(method.name, failed=first_line(error)))
        steps = [self.step(*copy.deepcopy(self._with_optimizer(each))) for each in continuations.values()]
        seconds = dict(zip(continuations, [timing.seconds for timing in take_turns(steps, rounds=ROUNDS)], strict=True))
        for name in figures:
            figures[name]["step"] = seconds[name] / seconds[FULL]
            figures[name]["switch_steps"] /= seconds[FULL]
        chosen = [name for name in continuations if name != FULL or dense]
        return [*(self._train_on(name, continuations[name], figures[name]) for name in chosen), *failures]

    def step(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
        """Return a training step on the first batches of the run, with the preparation of its batch."""
        data = self.task.data(self.seed)
        return lambda: train_step(model, optimizer, *next(data))

    def train(self, model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        """Train for some steps of the schedule, on the batches of that part of the run."""
        data = self.task.data(self.seed if steps.start == 0 else 1000 + self.seed)
        for index in steps:
            self.task.take_step(model, optimizer, next(data), (index + 1) / self.steps)

    def _apply(self, method: Method, share: float) -> tuple[Continuation, dict[str, Any]]:
        """Apply a method, and take one step with what it returns, on a copy."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        before = self.task.held_out_outputs(model)
        begin = self.clock()
        with separate_times():
            rewritten, new_optimizer = apply_quietly(method, model, optimizer, share, self.example)
        seconds = self.clock() - begin
        after = self.task.held_out_outputs(rewritten)
        continuation: Continuation = (rewritten.train(), new_optimizer)
        self.step(*copy.deepcopy(self._with_optimizer(continuation)))()
        figures = {
            "switch_steps": seconds,  # divided by the time of a dense step later
            "error": float((after - before).norm() / before.norm()),
            "parameters": _parameter_count(rewritten) / _parameter_count(self.start),
            "optimizer": _state_of(rewritten, new_optimizer),
        }
        return continuation, figures

    def _with_optimizer(self, continuation: Continuation) -> tuple[nn.Module, Optimizer]:
        model, optimizer = continuation
        return model, self.task.optimizer(model.parameters()) if optimizer is None else optimizer

    def _train_on(self, name: str, continuation: Continuation, figures: dict[str, Any]) -> MethodResult:
        model, optimizer = self._with_optimizer(continuation)
        if figures["step"] > SLOWEST:
            return self._method_result(name, failed=f"its step takes {figures['step']:.0f} dense ones", **figures)
        try:
            self.train(model.train(), optimizer, range(self.switch, self.steps))
            accuracy, loss = self.task.score(model)
        except Exception as error:  # as in results()
            return self._method_result(name, failed=first_line(error), **figures)
        return self._method_result(name, accuracy=accuracy, loss=loss, **figures)

    def _method_result(self, name: str, **figures: Any) -> MethodResult:
        return MethodResult(task=self.task.name, method=name, seed=self.seed, torch=torch.__version__, **figures)


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _state_of(model: nn.Module, optimizer: Optimizer | None) -> str:
    """Say for which share of the model's parameters an optimizer that continues has state."""
    if optimizer is None:
        return "new, state lost"
    with_state = sum(parameter.numel() for parameter in model.parameters() if optimizer.state.get(parameter))
    share = with_state / _parameter_count(model)
    return "carried" if share == 1 else f"goes on, state of {share:.0%}"


def first_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message.

    >>> first_line(TypeError("no\\nwhy"))
    'TypeError: no'
    """
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

"""One run of ``study_default.py``: dense up to the switch, then with a policy on the same batches; and its results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_common import Clock, separate_times
from study_data import learning_rate, train_step
from study_tasks import StudyTask
from torch import nn
from torch.optim import Optimizer

import tdfx
from tdfx.cost.timing import take_turns
from tdfx.demo.run import LEARNING_RATE

SWITCH_AT = 0.2
"""Share of the steps after which a run is rewritten."""
ROUNDS = 5
"""Steps of each model that are timed in turns."""
FULL = "dense"
"""The name of a run that is not rewritten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """The results of one policy on one task with one seed."""

    task: str
    policy: str
    seed: int
    accuracy: float = 0.0
    loss: float = 0.0
    """Both on the held-out data, in percent and in nats."""
    step: float = 1.0
    """Time of a step after the switch, relative to a dense step."""
    dense_seconds: float = 0.0
    """Time of a complete dense run."""
    first_plan: float = 0.0
    """Seconds of planning when no layer times were known; 0 where some were."""
    plan: float = 0.0
    """Seconds of planning when layer times were known."""
    rewrite: float = 0.0
    merge: float = 0.0
    """Both in seconds."""
    factorized: int = 0
    """Sites that were rewritten."""
    error: float = 0.0
    """The plan's total error."""
    predicted: float | None = None
    """How many times faster the plan predicted the step to be, if it did."""
    refused: str = ""
    """Why tdfx refused the policy; "" if it did not."""

    def faster(self, *, measuring: bool) -> float:
        """Return how many times faster the whole run was than a dense one, with or without measuring layers."""
        plan = (self.first_plan or self.plan) if measuring else self.plan
        return self.dense_seconds / (self.dense_seconds / self.faster_if_long + plan + self.rewrite + self.merge)

    @property
    def faster_if_long(self) -> float:
        """How many times faster a run would be that is so long that only its steps count."""
        return 1 / (SWITCH_AT + (1 - SWITCH_AT) * self.step)


class Study:
    """Runs of one task with one seed, from the same trained state."""

    def __init__(self, task: StudyTask, seed: int, steps: int, clock: Clock, dense_seconds: float = 0.0) -> None:
        """Train up to the switch; pass ``dense_seconds`` if the time of a dense run is known."""
        self.task, self.seed, self.steps, self.clock = task, seed, steps, clock
        self.switch = max(1, round(SWITCH_AT * steps))
        torch.manual_seed(seed)
        self.start = task.model().train()
        self.optimizer = task.optimizer(self.start.parameters())
        self.example = next(task.data(seed))
        self.train(self.start, self.optimizer, range(self.switch))
        self.dense_seconds = dense_seconds

    def dense(self) -> StudyRun:
        """Continue without a rewrite."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        (timing,) = take_turns([self.step(*copy.deepcopy((model, optimizer)))], rounds=ROUNDS)
        self.dense_seconds = self.steps * timing.seconds
        self.train(model, optimizer, range(self.switch, self.steps))
        return self._result(FULL, model)

    def with_policy(self, name: str, policy: tdfx.Policy, times: dict[str, float]) -> StudyRun:
        """Continue with a policy; the layer times that it measures are added to ``times``."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        cold = not times
        with separate_times(times):
            try:
                first, _ = self._timed_plan(model, policy, optimizer)
                again, plan = self._timed_plan(model, policy, optimizer)
            except (tdfx.PolicyError, tdfx.InputError) as error:
                return StudyRun(task=self.task.name, policy=name, seed=self.seed, refused=str(error))
        begin = self.clock()
        rewritten = tdfx.rewrite(model, plan, optimizer=optimizer)
        rewrite = self.clock() - begin
        dense_step = self.step(*copy.deepcopy((self.start, self.optimizer)))
        before, after = take_turns([dense_step, self.step(*copy.deepcopy((rewritten, optimizer)))], rounds=ROUNDS)
        self.train(rewritten, optimizer, range(self.switch, self.steps))
        begin = self.clock()
        merged = tdfx.merge(rewritten)
        step_seconds = self.dense_seconds / self.steps
        return self._result(
            name,
            merged,
            merge=self.clock() - begin,
            step=after.seconds / before.seconds,
            first_plan=first if cold else 0.0,
            plan=again,
            rewrite=rewrite,
            factorized=len(plan.factorized),
            error=plan.total_error,
            predicted=step_seconds / plan.predicted_seconds(step_seconds),
        )

    def step(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
        """Return a training step on the first batches of the run, with the preparation of its batch."""
        data = self.task.data(self.seed)
        return lambda: train_step(model, optimizer, *next(data))

    def train(self, model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        """Train for some steps of the schedule, on the batches of that part of the run."""
        data = self.task.data(self.seed if steps.start == 0 else 1000 + self.seed)
        for index in steps:
            for group in optimizer.param_groups:
                group["lr"] = self.task.peak * learning_rate((index + 1) / self.steps) / LEARNING_RATE
            train_step(model, optimizer, *next(data))

    def _timed_plan(self, model: nn.Module, policy: tdfx.Policy, optimizer: Optimizer) -> tuple[float, tdfx.Plan]:
        begin = self.clock()
        plan = tdfx.plan(model, policy, example_inputs=(self.example[0],), optimizer=optimizer)
        return self.clock() - begin, plan

    def _result(self, name: str, model: nn.Module, **figures: float | None) -> StudyRun:
        accuracy, loss = self.task.score(model)
        identity = {"task": self.task.name, "policy": name, "seed": self.seed}
        scores = {"accuracy": accuracy, "loss": loss, "dense_seconds": self.dense_seconds}
        return StudyRun(**identity, **scores, **figures)  # type: ignore[arg-type]

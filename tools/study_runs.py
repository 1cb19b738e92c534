"""One run of ``study_default.py``: dense up to the switch, then on with a policy, on the same batches; what it came to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bench_common import Seconds, own_times
from bench_freeze import rate
from study_tasks import Batch, Task, loss_of
from torch import nn
from torch.optim import Optimizer

import tdfx
from tdfx.cost.timing import take_turns
from tdfx.demo.run import LEARNING_RATE

SWITCH_AT = 0.2
"""Part of the steps after which a run is rewritten."""
ROUNDS = 5
"""Steps of either model that are timed in turns."""
FULL = "dense"
"""The name of a run that is not rewritten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one policy came to, from one seed."""

    task: str
    policy: str
    seed: int
    accuracy: float = 0.0
    """Right answers on what is held out, in percent."""
    loss: float = 0.0
    """Mean loss on it, in nats."""
    step: float = 1.0
    """Time of a step after the switch, in that of a dense one."""
    dense_seconds: float = 0.0
    """A dense run."""
    first_plan: float = 0.0
    """Planning with no times known yet, in seconds; 0 where some were."""
    plan: float = 0.0
    """Planning with times known, in seconds."""
    rewrite: float = 0.0
    merge: float = 0.0
    """What these take, in seconds."""
    factorized: int = 0
    """Sites that were rewritten."""
    error: float = 0.0
    """The plan's total error."""
    predicted: float | None = None
    """How many times faster the plan said that the step gets, where it says so."""
    refused: str = ""
    """Why the policy could not be followed."""

    def faster(self, *, measuring: bool) -> float:
        """Return how many times faster the whole run was than a dense one."""
        plan = (self.first_plan or self.plan) if measuring else self.plan
        return self.dense_seconds / (self.dense_seconds / self.faster_if_long + plan + self.rewrite + self.merge)

    @property
    def faster_if_long(self) -> float:
        """How many times faster a run would be in which all but the steps takes no time."""
        return 1 / (SWITCH_AT + (1 - SWITCH_AT) * self.step)


class Study:
    """Runs of one task from one seed."""

    def __init__(self, task: Task, seed: int, steps: int, clock: Seconds, dense_seconds: float = 0.0) -> None:
        """Train up to the switch; a dense run's time may be known from before."""
        self.task, self.seed, self.steps, self.clock = task, seed, steps, clock
        self.switch = max(1, round(SWITCH_AT * steps))
        torch.manual_seed(seed)
        self.start = task.model().train()
        self.optimizer = task.optimizer(self.start.parameters())
        self.example = next(task.data(seed))
        self._train(self.start, self.optimizer, range(self.switch))
        self.dense_seconds = dense_seconds

    def dense(self) -> Run:
        """Go on as it is."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        (timing,) = take_turns([self._step(*copy.deepcopy((model, optimizer)))], rounds=ROUNDS)
        self.dense_seconds = self.steps * timing.seconds
        self._train(model, optimizer, range(self.switch, self.steps))
        return self._run(FULL, model)

    def with_policy(self, name: str, policy: tdfx.Policy, known: dict[str, float]) -> Run:
        """Go on with a policy; what is measured for it is added to what is known."""
        model, optimizer = copy.deepcopy((self.start, self.optimizer))
        cold = not known
        with own_times(known):
            try:
                first, _ = self._planned(model, policy, optimizer)
                again, plan = self._planned(model, policy, optimizer)
            except (tdfx.PolicyError, tdfx.InputError) as error:
                return Run(task=self.task.name, policy=name, seed=self.seed, refused=str(error))
        begin = self.clock()
        small = tdfx.rewrite(model, plan, optimizer=optimizer)
        rewrite = self.clock() - begin
        dense = self._step(*copy.deepcopy((self.start, self.optimizer)))
        before, after = take_turns([dense, self._step(*copy.deepcopy((small, optimizer)))], rounds=ROUNDS)
        self._train(small, optimizer, range(self.switch, self.steps))
        begin = self.clock()
        merged = tdfx.merge(small)
        return self._run(
            name,
            merged,
            merge=self.clock() - begin,
            step=after.seconds / before.seconds,
            first_plan=first if cold else 0.0,
            plan=again,
            rewrite=rewrite,
            factorized=len(plan.factorized),
            error=plan.total_error,
            predicted=self.dense_seconds / self.steps / plan.predicted_seconds(self.dense_seconds / self.steps),
        )

    def _planned(self, model: nn.Module, policy: tdfx.Policy, optimizer: Optimizer) -> tuple[float, tdfx.Plan]:
        begin = self.clock()
        plan = tdfx.plan(model, policy, example_inputs=(self.example[0],), optimizer=optimizer)
        return self.clock() - begin, plan

    def _run(self, name: str, model: nn.Module, **figures: float | None) -> Run:
        accuracy, loss = self.task.score(model)
        own = {"task": self.task.name, "policy": name, "seed": self.seed}
        return Run(**own, accuracy=accuracy, loss=loss, dense_seconds=self.dense_seconds, **figures)  # type: ignore[arg-type]

    def _step(self, model: nn.Module, optimizer: Optimizer) -> Step:
        return Step(model, optimizer, self.task.data(self.seed))

    def _train(self, model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        """Train from one step of the schedule to another, on the batches that belong there."""
        step = Step(model, optimizer, self.task.data(self.seed if steps.start == 0 else 1000 + self.seed))
        for done in steps:
            for group in optimizer.param_groups:
                group["lr"] = self.task.peak * rate((done + 1) / self.steps) / LEARNING_RATE
            step()


@dataclass(frozen=True, slots=True)
class Step:
    """A training step, with the making of its batch."""

    model: nn.Module
    optimizer: Optimizer
    data: Iterator[Batch]

    def __call__(self) -> None:
        """Take it."""
        x, y = next(self.data)
        loss = loss_of(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

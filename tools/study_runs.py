"""One run of ``study_default.py``: a whole training, dense or with a switch of some settings, and its results."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self
from unittest.mock import patch

import torch
from bench_common import Clock, separate_times
from study_tasks import StudyTask

import tdfx
from tdfx.checks import read_record

FULL = "dense"
"""The name of a run that is not rewritten."""
PERCENT = 5
"""The control's steps are rounded up to a multiple of this share of the full run's, so that several settings share one."""
DAMPING = "tdfx.factors.metric.DAMPING"
"""The constant that the setting ``damping`` replaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """What a study varies; None leaves it as tdfx has it by default."""

    speedup: float | None = None
    flops: float | None = None
    """Budgets, as in ``tdfx.Policy``; the default's other settings stay."""
    metric: str | None = None
    """As in ``tdfx.Policy``."""
    floor: float | None = None
    """Both floors of the budget: the least share of each full rank."""
    moment: float | None = None
    """Share of the steps after which to switch, in (0, 1)."""
    collect: int | None = None
    """Steps at which moments are collected."""
    damping: float | None = None
    """What is added to the moments, relative to their mean diagonal."""
    tail: float | None = None
    """Share of the steps after which to merge and train on dense, in (0, 1)."""
    carry_state: bool | None = None
    """As in ``tdfx.rewrite``."""

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the settings of a name, as ``"speedup=3 moment=0.05"``.

        >>> StudySettings.parse("speedup=3 floor=0.2").name
        'speedup=3 floor=0.2'
        >>> StudySettings.parse("default").name
        'default'
        """
        parts = (part.partition("=")[::2] for part in name.split() if part != "default")
        return read_record(cls, {key: value if key == "metric" else json.loads(value) for key, value in parts})

    @property
    def name(self) -> str:
        """The settings that are not those of tdfx, as text."""
        values = ((each.name, getattr(self, each.name), each.default) for each in dataclasses.fields(self))
        return " ".join(f"{name}={_text(value)}" for name, value, default in values if value != default) or "default"

    def policy(self) -> tdfx.Policy:
        """Return the policy of these settings."""
        rank, changes = tdfx.Policy().rank, dict[str, Any]()
        assert isinstance(rank, tdfx.Budget), "the default's rank rule is no budget any more"
        if self.speedup is not None or self.flops is not None:
            changes |= {"speedup": self.speedup, "flops": self.flops}
        if self.floor is not None:
            changes |= {"floor": self.floor, "noise_floor": self.floor}
        given: dict[str, Any] = {"rank": replace(rank, **changes)} if changes else {}
        if self.metric is not None:
            given["metric"] = self.metric
        return tdfx.Policy(**given)

    def switch(self, steps: int, clock: Clock) -> tdfx.Switch:
        """Return the switch of a run of so many steps."""
        options: dict[str, Any] = {"total_steps": steps, "clock": clock}
        if self.moment is not None:
            options["when"] = tdfx.AtStep(max(1, round(self.moment * steps)))
        if self.collect is not None:
            options["collect"] = self.collect
        return tdfx.Switch(self.policy(), **options)

    def constants(self) -> AbstractContextManager[object]:
        """Replace the constants of tdfx that no argument sets, as long as the context lasts."""
        return nullcontext() if self.damping is None else patch(DAMPING, self.damping)


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, bool) else f"{value:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """The results of one run."""

    task: str
    policy: str
    """The name of the settings, or of a dense run."""
    seed: int
    accuracy: float = 0.0
    loss: float = 0.0
    """Both of the merged model on the held-out data, in percent and in nats."""
    steps: int = 0
    seconds: float = 0.0
    """Of the whole training, with planning, rewriting and merging."""
    switching: float = 0.0
    """Seconds of these that the switch took: planning, with the measuring of layers, and rewriting."""
    cold: bool = False
    """True if the run had to measure layers, because no layer times were known."""
    at: int = 0
    """The step after which was decided."""
    factorized: int = 0
    """Sites that were rewritten."""
    error: float = 0.0
    """The plan's total error."""
    refused: str = ""
    """Why tdfx refused the policy; "" if it did not."""


_DENSE = StudySettings()


def control_of(run: StudyRun, full: StudyRun) -> tuple[str, int]:
    """Return name and steps of the dense run that takes as long as a run, or a little longer; the full run for a slow one.

    >>> full = StudyRun(task="t", policy=FULL, seed=0, steps=200, seconds=10.0)
    >>> control_of(StudyRun(task="t", policy="p", seed=0, seconds=4.1), full)
    ('dense, 45 %', 90)
    """
    percent = PERCENT * math.ceil(100 * run.seconds / full.seconds / PERCENT)
    if percent >= 100:
        return FULL, full.steps
    return f"dense, {percent} %", max(1, percent * full.steps // 100)


def train(task: StudyTask, policy: str, seed: int, steps: int, clock: Clock) -> StudyRun:
    """Train without a switch."""
    return _train(StudyRun(task=task.name, policy=policy, seed=seed, steps=steps), task, None, clock)


def train_with(
    settings: StudySettings, task: StudyTask, seed: int, steps: int, clock: Clock, times: dict[str, float]
) -> StudyRun:
    """Train with a switch; the layer times that it measures are added to ``times``."""
    none_known, run = not times, StudyRun(task=task.name, policy=settings.name, seed=seed, steps=steps)
    with separate_times(times), settings.constants():
        try:
            run = _train(run, task, settings.switch(steps, clock), clock, settings)
        except tdfx.PolicyError as error:
            return replace(run, refused=str(error))
    return replace(run, cold=none_known and bool(times))


def _train(
    run: StudyRun,
    task: StudyTask,
    switch: tdfx.Switch | None,
    clock: Clock,
    settings: StudySettings = _DENSE,
) -> StudyRun:
    torch.manual_seed(run.seed)
    model = task.model().train()
    optimizer, data = task.optimizer(model.parameters()), task.data(run.seed)
    example = next(task.data(run.seed))[0]
    began = clock()
    for step in range(run.steps):
        task.take_step(model, optimizer, next(data), (step + 1) / run.steps)
        if switch is not None:
            model = switch.step(model, optimizer=optimizer, example_inputs=(example,), carry_state=settings.carry_state)
            if settings.tail is not None and step + 1 == round(settings.tail * run.steps):
                model = tdfx.merge(model, optimizer=optimizer)
    plan = None if switch is None else switch.plan
    if plan is not None and settings.tail is None:
        model = tdfx.merge(model)
    run = replace(run, seconds=clock() - began)
    accuracy, loss = task.score(model)
    run = replace(run, accuracy=accuracy, loss=loss)
    if switch is None:
        return run
    at = max((event.step for event in switch.events), default=0)
    run = replace(run, switching=sum(switch.spent.values()), at=at)
    return run if plan is None else replace(run, factorized=len(plan.factorized), error=plan.total_error)

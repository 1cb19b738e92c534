"""The training step, timed in turns with a few of its layers, so that it can be compared with times that were taken before.

A busy machine makes everything slower, the step and its layers alike. So what counts of the step is how many times longer it
takes than these layers in the same round; their known times turn that into seconds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from tdfx.cost.measured import Measured
from tdfx.cost.modelled import Case
from tdfx.cost.timing import Timing, take_turns
from tdfx.cost.workload import Workload
from tdfx.devices import raise_if_broken
from tdfx.distributed.processes import Processes
from tdfx.passes.analysis.sandbox import isolated
from tdfx.passes.planning.site_cost import calls_of, current_chain
from tdfx.passes.planning.training_step import TrainingStep
from tdfx.passes.program import Site

_AGREES = 1.25
"""Two times of a step agree if neither is more than this many times the other."""
_ROUNDS = 3
"""Undisturbed samples of a step."""
_CONFIRMED = 0.05
"""Relative error of a known time with which another sample agrees."""
_QUIETER = 0.9
"""A load below this many times another one is the lower one."""
_CONTRADICTED = 0.3
"""Relative error of a known time with which new samples under a higher load disagree."""
_LEAST_DOUBT = 0.03
"""Relative error that a time of a step has at best."""
_ONE_SAMPLE = 0.1
"""Relative error of a step of which there is one sample."""
_MOST = 0.7
"""Share of the samples that a single disturbance leaves alone."""
_LAYERS = 3
"""How many layers are timed beside the step."""
_TOO_LONG = 1.25
"""Layers that alone take this many times longer than the whole step contradict it: less is due to their cold caches."""
_LEAST_SHARE = 0.1
"""Layers that take less than this share of the step say nothing of the load under which the rest of it runs."""
_DISAGREE = 0.5
"""A layer whose time has changed by this much more than that of the others contradicts its known time."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The layers that take most of a step by the model's arithmetic."""

    shares: Mapping[Case, float]
    """One call of each -> the number of its calls in the step."""
    covered: float
    """The share of all layers' time that they take, by arithmetic."""

    @classmethod
    def of(cls, sites: Iterable[Site], cost: Measured) -> Beside:
        """Choose the layers that take most time, each as it is computed now."""
        seconds: dict[Case, float] = {}
        calls: dict[Case, int] = {}
        for site in sites:
            if not site.flows or site.operation is None:
                continue
            for steps, flow in calls_of(site, current_chain(site)):
                case = (tuple(steps), flow)
                calls[case] = calls.get(case, 0) + 1
                seconds[case] = seconds.get(case, 0.0) + cost.modelled.seconds(steps, flow)
        chosen = sorted(seconds, key=seconds.__getitem__, reverse=True)[:_LAYERS]
        total = sum(seconds.values())
        return cls(
            {case: calls[case] for case in chosen}, sum(map(seconds.__getitem__, chosen)) / total if total else 0.0
        )

    def workloads(self, cost: Measured) -> dict[Case, Workload]:
        """Return what is timed for each layer; one that cannot be run alone is left out."""
        works: dict[Case, Workload] = {}
        for case in self.shares:
            try:
                work = cost.workload(case, tuple(works.values()))
                work.run()
                works[case] = work
            except RuntimeError as error:
                raise_if_broken(error)
        return works


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step takes, and how sure that is."""

    seconds: float
    """Time of forward and backward, under the load of the machine under which the known times of its layers were taken."""
    doubt: float
    """Relative error that is to be expected."""
    on_the_wall: float = math.nan
    """The time by the clock on the wall, under the load of the machine now."""
    load: float = 1.0
    """The load of the machine, see ``Timing``."""
    layers: float | None = None
    """The share of the step that its layers take alone; None where none was timed beside it."""
    disagreement: float = 0.0
    """How much more, relatively, the time of one layer has changed than that of the others since it was known."""

    @classmethod
    def of(
        cls,
        step: Timing,
        layers: Mapping[Case, Timing],
        known: Mapping[Case, float],
        beside: Beside,
    ) -> Self:
        """Compare the samples of a step with those of the layers in the same rounds.

        Args:
            step: The samples of the step.
            layers: Those of the layers.
            known: Their times as they were known before.
            beside: The layers.
        """
        alone = cls.alone(step)
        if not layers:
            return alone
        together = [sum(samples) for samples in zip(*(timing.samples for timing in layers.values()), strict=True)]
        ratios = [sample / layer for sample, layer in zip(step.samples, together, strict=True)]
        ratio = statistics.median(ratios)
        covered = beside.covered * len(layers) / len(beside.shares)
        called = sum(beside.shares[case] * timing.seconds for case, timing in layers.items())
        share = called / (ratio * sum(timing.seconds for timing in layers.values())) / covered
        if share < _LEAST_SHARE:
            return replace(alone, layers=share)
        changes = [timing.seconds / known[case] for case, timing in layers.items() if case in known]
        middle = statistics.median(changes) if changes else 1.0
        disagreement = max((abs(change / middle - 1) for change in changes), default=0.0)
        doubt = max(_spread(ratios, ratio), min(disagreement, 1.0) / 2 if disagreement > _DISAGREE else 0.0)
        unit = sum(known.get(case, timing.seconds) for case, timing in layers.items())
        return replace(alone, seconds=ratio * unit, doubt=doubt, layers=share, disagreement=disagreement)

    @classmethod
    def alone(cls, step: Timing) -> Self:
        """Take the samples of a step as they are."""
        return cls(step.seconds, _spread(step.samples, step.seconds), step.seconds * step.load, step.load)

    @property
    def contradictions(self) -> list[str]:
        """What contradicts, in words; the step and its layers are timed again then."""
        words = []
        if self.layers is not None and self.layers > _TOO_LONG:
            words.append(f"its layers alone take {self.layers:.1f} times as long as the whole step")
        if self.disagreement > _DISAGREE:
            words.append(
                f"some of its layers have become {1 + self.disagreement:.1f} times slower or faster than others"
            )
        return words


def _spread(samples: Sequence[float], middle: float) -> float:
    """Return how far, relatively, most of the samples are from their middle at the most."""
    if len(samples) < 2:
        return _ONE_SAMPLE
    distances = sorted(abs(sample / middle - 1) for sample in samples)
    return max(_LEAST_DOUBT, distances[int(_MOST * (len(distances) - 1))])


def time_beside(
    step: TrainingStep,
    sites: Iterable[Site],
    cost: Measured,
    loop_seconds: float | None,
    most_seconds: float,
    processes: Processes,
) -> tuple[StepTime, list[str]]:
    """Time a step in turns with some of its layers, as often as it takes to agree with what is known of it.

    All processes call this together, and take the same turns; what the first one measures and knows counts.

    Args:
        step: The step.
        sites: The sites of its model.
        cost: Knows the times of layers and steps.
        loop_seconds: Time of a step in the training loop, by the clock on the wall; None if unknown.
        most_seconds: About how long it may take.
        processes: The processes that train the model.

    Returns:
        The time of the step, and what contradicts it, in words.
    """
    agree = processes.broadcast_object
    beside = Beside.of(sites, cost)
    works = beside.workloads(cost)
    timed_layers = agree([case in works for case in beside.shares])
    cases = [case for case, is_timed in zip(beside.shares, timed_layers, strict=True) if is_timed]
    runs = [step.gradients, *(works[case].run if case in works else _nothing for case in cases)]

    def sample(rounds: int, seconds: float) -> StepTime:
        with isolated(step.module):
            first, *others = take_turns(
                runs, device=step.device, rounds=rounds, most_seconds=seconds, agree=agree, every_round=True
            )
        pairs = zip(cases, others, strict=True)
        layers = {case: timing.divided(works[case].steps) for case, timing in pairs if case in works}
        known = {case: seconds for case, (seconds, _) in cost.recall(layers).items() if not isinstance(case, str)}
        fresh: dict[str | Case, tuple[float, float]] = {}
        if rounds > 1:
            fresh |= {case: (each.seconds, each.load) for case, each in layers.items() if case not in known}
        if processes.is_first:
            cost.record(fresh, first.load)
        return agree(StepTime.of(first, layers, known, beside))  # type: ignore[no-any-return]

    known, loop_seconds, most_seconds = agree([cost.recall([step.key]).get(step.key), loop_seconds, most_seconds])
    if known is not None or loop_seconds is not None:
        timed = sample(1, most_seconds)
        if known is not None and _agree(timed.seconds, known[0]):
            return replace(timed, seconds=known[0], doubt=_CONFIRMED), []
        if known is None and loop_seconds is not None and _agree(timed.on_the_wall, loop_seconds):
            return timed, []
    timed = sample(_ROUNDS, most_seconds)
    if timed.contradictions:
        timed = sample(2 * _ROUNDS, most_seconds / 2)
    notes = [f"times contradict one another: {words}, also when timed again" for words in timed.contradictions]
    if known is not None and not _agree(timed.seconds, known[0]):
        notes.append(
            f"times contradict one another: beside its layers the step took {timed.seconds / known[0]:.2g} times as long as "
            f"when it was timed before, also when timed again; the time under the lower load counts"
        )
        if known[1] < _QUIETER * timed.load:
            return replace(timed, seconds=known[0], doubt=max(timed.doubt, _CONTRADICTED)), notes
    if timed.doubt <= _CONTRADICTED and processes.is_first:
        cost.record({step.key: (timed.seconds, timed.load)}, timed.load)
    return timed, notes


def _nothing() -> None:
    """Take the turn of a layer that this process cannot run, and the first one can."""


def _agree(first: float, second: float) -> bool:
    return first < _AGREES * second and second < _AGREES * first

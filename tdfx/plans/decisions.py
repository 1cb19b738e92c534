"""The decisions for every site of a model, and their totals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tdfx.errors import nearest
from tdfx.plans.site import Int64, SitePlan

Emit = Literal["graph", "modules"]
"""How a rewritten model is given back: as a ``GraphModule``, or as the same class with its sites swapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What a plan holds, without what prints or saves it; the tables of a plan are made of this."""

    sites: tuple[SitePlan, ...]
    """Every convolution and linear layer, and every parameter used as the weight of one, in the order of the state_dict."""
    emit: Emit = "graph"
    """How the rewritten model will be given back."""
    notes: tuple[str, ...] = ()
    """What concerns the whole model, such as why it cannot be given back as a graph."""
    model: str = ""
    """The class of the model."""
    policy: str = ""
    """The policy as it prints itself; for the record only."""
    other_parameters: Int64 = 0
    """Parameters of the model that belong to no site's weight: biases, norms, embeddings."""
    step_seconds: float | None = None
    """Measured time of the model's training step as it is now, in seconds; None where it was not measured."""

    def __iter__(self) -> Iterator[SitePlan]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> SitePlan:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site {name!r} in this plan. Nearest: {nearest(name, [site.name for site in self.sites])}")

    @property
    def factorized(self) -> tuple[SitePlan, ...]:
        """The sites that will be rewritten."""
        return tuple(site for site in self.sites if site.factorized)

    @property
    def kept(self) -> tuple[SitePlan, ...]:
        """The sites that stay as they are, each with its reason."""
        return tuple(site for site in self.sites if not site.factorized)

    @property
    def parameters_before(self) -> int:
        """Parameters of the whole model now."""
        return self.other_parameters + sum(site.parameters_before for site in self.sites)

    @property
    def parameters_after(self) -> int:
        """Parameters of the whole model after the rewrite."""
        return self.other_parameters + sum(site.parameters_after for site in self.sites)

    @property
    def flops_before(self) -> int | None:
        """Forward operations of all sites that are called; None without example inputs."""
        return _total([site.flops_before for site in self.sites if site.calls])

    @property
    def flops_after(self) -> int | None:
        """The same, after the rewrite."""
        return _total([site.flops_after for site in self.sites if site.calls])

    @property
    def memory_before(self) -> int | None:
        """Bytes that all sites that are called add to a training step; None without example inputs."""
        return _total([site.memory_before for site in self.sites if site.calls])

    @property
    def memory_after(self) -> int | None:
        """The same, after the rewrite."""
        return _total([site.memory_after for site in self.sites if site.calls])

    @property
    def step_seconds_after(self) -> float | None:
        """Predicted time of the training step after the rewrite, in seconds; None where the step was not measured."""
        return None if self.step_seconds is None else self.predicted_seconds(self.step_seconds)

    def predicted_seconds(self, step_seconds: float) -> float:
        """Return how long a training step is predicted to take after the rewrite, in seconds.

        Args:
            step_seconds: How long it takes now. The part of it that is not spent in sites stays.
        """
        times = [(site.seconds_before, site.seconds_after) for site in self.sites]
        measured = [(before, after) for before, after in times if before is not None and after is not None]
        share = part_of_step(sum(before for before, _ in measured), step_seconds)
        return step_seconds - share * sum(before - after for before, after in measured)

    @property
    def speedup(self) -> float | None:
        """How many times faster the model's training step is predicted to be; None where it was not measured."""
        after = self.step_seconds_after
        return None if self.step_seconds is None or after is None else self.step_seconds / after

    @property
    def total_error(self) -> float:
        """The squares of the sites' errors, summed: what a budget keeps as small as it can."""
        return sum(site.error * site.error for site in self.sites if site.error is not None)


def part_of_step(sites: float, step: float) -> float:
    """Return the share of their own time that sites take in a step: all of it, unless that were longer than the step.

    Args:
        sites: Time of all sites, each measured alone.
        step: Time of the step, in the same unit.

    >>> part_of_step(0.5, 1.0), part_of_step(2.0, 1.0)
    (1.0, 0.5)
    """
    return min(1.0, step / sites) if sites > 0 else 1.0


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum, or None if any count is unknown or there is none."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total if counts else None

"""The decision for each site of a model: how it will be factorized, or why it is kept; and the totals of all sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from annotated_types import Interval

from tdfx.errors import PlanError, nearest
from tdfx.factors.metric import MetricName

Int64 = Annotated[int, Interval(gt=-(2**63), lt=2**63)]
"""A whole number of 64 bits: a larger one in a plan file is a mistake, and could not be turned into a float."""
Emit = Literal["graph", "modules"]
"""How a rewritten model is given back: as a ``GraphModule``, or as the same class with its sites swapped."""


class Reason(StrEnum):
    """Why a site is kept as it is; the list is closed, so that code can read it."""

    EXCLUDED = "excluded"
    """The policy excludes it."""
    NO_SIGNAL = "no_signal"
    """The weight shows nothing above the noise yet."""
    NO_GAIN = "no_gain"
    """By the policy's cost, factorizing at the chosen ranks would not make its training step enough faster."""
    TOO_SMALL = "too_small"
    """By the policy's cost, not even the lowest ranks would make it enough faster."""
    NOT_NEEDED = "not_needed"
    """The policy's budget is kept at less loss without it."""
    NO_SCHEME = "no_scheme"
    """No scheme, or not the requested one, can stand for this kind of layer."""
    FROZEN = "frozen"
    """Its weight has no gradient, so training it faster has no meaning."""
    TIED = "tied"
    """Its weight is shared with another module."""
    READ_ELSEWHERE = "read_elsewhere"
    """Its weight is read by something other than a call of the layer."""
    PARAMETRIZED = "parametrized"
    """Its weight is computed from other tensors, as weight_norm does."""
    UNINITIALIZED = "uninitialized"
    """A lazy layer that has not seen its first input."""
    CUSTOM_FORWARD = "custom_forward"
    """A subclass that computes something else than its stock class."""
    NOT_CALLED = "not_called"
    """``forward`` never calls it."""
    FACTORIZED = "factorized"
    """It is factorized already, and the policy asks for no lower ranks, or for another scheme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """The decision for one site."""

    name: str
    """Path of the layer in the model, "" for a model that is itself the layer; or path of the parameter."""
    kind: str
    """The layer kind, such as ``Conv2d``, or a function, such as ``F.linear``."""
    shape: tuple[Int64, ...]
    """Shape of the weight, (out, in / groups, *kernel) or transposed (in, out / groups, *kernel); () if not known yet."""
    calls: Int64
    """How many times one forward pass calls the layer, where that is known; 0 if never."""
    groups: Int64 = 1
    """Blocks of channels that do not see one another, at least 1."""
    transposed: bool = False
    """True for a transposed convolution."""
    parameter: str | None = None
    """Path of the parameter that functions take as their weight, where the site is such calls; None for a layer."""
    scheme: str | None = None
    """The scheme, or None where the site is kept."""
    ranks: tuple[Int64, ...] | None = None
    """One rank for each mode, or None where the site is kept."""
    recompute: bool = False
    """True if the backward pass computes what flows between the factors again, so that training need not keep it."""
    full_ranks: tuple[Int64, ...] | None = None
    """The ranks at which nothing would be lost, where a scheme fits."""
    reason: Reason | None = None
    """Why the site is kept, or None where it is factorized."""
    note: str = ""
    """What else there is to know of the decision, in words."""
    parameters_before: Int64
    """Values in the weight, or in the factors of a site that is factorized already."""
    parameters_after: Int64
    """Values in the factors, or as before where the site is kept."""
    flops_before: Int64 | None = None
    """Floating-point operations of one forward pass as the site is now; None without example inputs."""
    flops_after: Int64 | None = None
    """The same, after the rewrite."""
    memory_before: Int64 | None = None
    """Bytes that the site adds to a training step as it is now; None without example inputs."""
    memory_after: Int64 | None = None
    """The same, after the rewrite."""
    activations_before: Int64 | None = None
    """Bytes that the site, as it is now, keeps from its forward pass for its backward pass: its inputs, and what flows
    between factors; None without example inputs."""
    activations_after: Int64 | None = None
    """The same, after the rewrite."""
    seconds_before: float | None = None
    """Measured time of the site's training step as it is now, over all its calls, in seconds; None where not measured."""
    seconds_after: float | None = None
    """The same, after the rewrite."""
    estimated: bool = False
    """True if one or both of these times were not measured for lack of time, but estimated from times that were."""
    gain: float | None = None
    """How many times faster the site's training step becomes, by the policy's cost; None where that was not asked."""
    error: float | None = None
    """Frobenius norm of what the split loses, relative to that of the weight as it is now, both in ``metric``; None where
    the site is kept or its weight has no values (meta device)."""
    metric: MetricName = "weights"
    """What the error is measured in, and the split is the nearest in: the weight itself, what it does to the inputs that
    were seen in training, or what that does to the loss."""

    def __post_init__(self) -> None:
        if (self.scheme is None) != (self.ranks is None) or (self.scheme is None) == (self.reason is None):
            raise PlanError(
                f"Site {self.name!r} has scheme={self.scheme!r}, ranks={self.ranks!r} and reason={self.reason!r}: a site "
                f"is either factorized, with a scheme and ranks, or kept, with a reason."
            )
        if self.recompute and self.scheme is None:
            raise PlanError(
                f"Site {self.name!r} is kept and has recompute=True: only what flows between factors is recomputed."
            )
        if self.groups < 1:
            raise PlanError(f"Site {self.name!r} has groups={self.groups}: it is at least 1, and 1 for a linear map.")

    @property
    def factorized(self) -> bool:
        """True if the site will be rewritten."""
        return self.scheme is not None


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
    uncertainty: float | None = None
    """Relative error to be expected of ``step_seconds_after``, at least 0: 0.05 for five percent; None where that is not
    predicted."""

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
    def activations_before(self) -> int | None:
        """Bytes that all sites that are called keep for their backward passes; None without example inputs."""
        return _total([site.activations_before for site in self.sites if site.calls])

    @property
    def activations_after(self) -> int | None:
        """The same, after the rewrite."""
        return _total([site.activations_after for site in self.sites if site.calls])

    @property
    def step_seconds_after(self) -> float | None:
        """Predicted time of the training step after the rewrite, in seconds; None where the step was not measured."""
        return None if self.step_seconds is None else self.predicted_seconds(self.step_seconds)

    def predicted_seconds(self, step_seconds: float) -> float:
        """Return how long a training step is predicted to take after the rewrite, from how long it takes now, in seconds.

        Where the plan knows the time of the step, it takes as many times longer after the rewrite as now, since a busy
        machine makes all of it slower.
        """
        if self.step_seconds is not None and self.step_seconds > 0:
            return self._predicted(self.step_seconds) * (step_seconds / self.step_seconds)
        return self._predicted(step_seconds)

    def _predicted(self, step_seconds: float) -> float:
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
    """Return the share of their times, measured alone, that sites take in a step: all, unless that were more than the step.

    >>> part_of_step(0.5, 1.0), part_of_step(2.0, 1.0)
    (1.0, 0.5)
    """
    return min(1.0, step / sites) if sites > 0 else 1.0


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum, or None if any count is unknown or there is none."""
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None

"""The decision for one site: how it will be factorized, or why it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from annotated_types import Interval

from tdfx.errors import PlanError

Int64 = Annotated[int, Interval(gt=-(2**63), lt=2**63)]
"""A whole number of 64 bits: a larger one in a plan file is a mistake, and could not be turned into a float."""


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
    """Shape of the weight in torch's layout, (out, in / groups, *kernel) or transposed (in, out / groups, *kernel); () where
    it is not known yet."""
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
    """Bytes that the site adds to a training step as it is now: weights, gradients, two moments, and the activations
    between its factors; None without example inputs."""
    memory_after: Int64 | None = None
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
    """Frobenius norm of what the split loses, relative to that of the weight as it is now; None where the site is kept,
    or where its weight lies on the meta device and has no values."""

    def __post_init__(self) -> None:
        if (self.scheme is None) != (self.ranks is None) or (self.scheme is None) == (self.reason is None):
            raise PlanError(
                f"Site {self.name!r} has scheme={self.scheme!r}, ranks={self.ranks!r} and reason={self.reason!r}: a site "
                f"is either factorized, with a scheme and ranks, or kept, with a reason."
            )
        if self.groups < 1:
            raise PlanError(f"Site {self.name!r} has groups={self.groups}: it is at least 1, and 1 for a linear map.")

    @property
    def factorized(self) -> bool:
        """True if the site will be rewritten."""
        return self.scheme is not None

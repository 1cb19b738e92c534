"""The time of a site by arithmetic alone, for use without a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch

from tdfx.checks import is_number
from tdfx.cost.count import Flow, StepCount, count_chain
from tdfx.cost.rates import rates
from tdfx.errors import PolicyError
from tdfx.factors.operation import Operation

_NOMINAL_SAMPLES = 32
_NOMINAL_SIZE = 32


class Cost(Protocol):
    """Anything that can say how long a chain of operations takes in training."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the time of forward and backward through a chain, in seconds."""


Case = tuple[tuple[Operation, ...], Flow | None]
"""A chain of operations and what flows into it; None where that is not known."""


@runtime_checkable
class MeasuringCost(Protocol):
    """A cost that takes its time to answer, and so wants to be asked for many chains at once."""

    @property
    def modelled(self) -> Cost:
        """What answers at once, where a first guess will do."""

    @property
    def autocast(self) -> torch.dtype | None:
        """What the training loop's autocast computes in; None for what is in force."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the time of forward and backward through a chain, in seconds."""

    def update_seconds(self, values: int, device: str) -> float:
        """Return how long an optimizer takes for its update of so many weight values."""

    def measure(self, groups: Iterable[Sequence[Case]], *, spent: float = 0.0) -> dict[Case, float]:
        """Return the times of cases in seconds; those of one group, which compete for one place, are compared.

        ``spent`` are the seconds that measuring for the same plan has taken already.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """Each operation takes the sum of its arithmetic, its memory traffic and a start-up time.

    Only ratios between chains are used, so what matters is how the three numbers relate, not their absolute size. The
    defaults are those of one core of a server CPU in float32. A roofline, which takes the larger of the first two instead
    of their sum, is too kind to small layers: measured on such a core, a quarter of the ranks of a 3×3 convolution of 64
    channels, at 8×8 positions and batch 32, is 2.7 times faster than dense; this sum says 2.7, the roofline 7.8.
    """

    flops_per_second: float = 1.5e11
    """Arithmetic rate in floating-point operations per second, positive."""
    bytes_per_second: float = 1e10
    """Memory rate in bytes per second, positive; values are counted as 4 bytes."""
    seconds_per_call: float = 5e-5
    """What any operation takes before it computes anything, in seconds, not negative."""

    @classmethod
    def of_machine(cls, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Return the model with the numbers of this machine, from three small layers timed in about a second, then kept.

        Args:
            device: Where the model trains, as torch writes it.
            dtype: In which the layers compute.
        """
        found = rates(device, dtype)
        return cls(
            flops_per_second=found.flops_per_second,
            bytes_per_second=found.bytes_per_second,
            seconds_per_call=found.seconds_per_call,
        )

    def __post_init__(self) -> None:
        each = (self.flops_per_second, self.bytes_per_second, self.seconds_per_call)
        numbers = all(is_number(one) or one == math.inf for one in each)
        if not (numbers and self.flops_per_second > 0 and self.bytes_per_second > 0 and self.seconds_per_call >= 0):
            raise PolicyError(
                f"{self!r} has a rate that is not positive or a negative time: the first two are amounts per second, "
                f"the third is in seconds. Leave a field out to take its default."
            )

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the modelled time of one training step through a chain, in seconds.

        Backward is counted as twice the forward: one product for the input's gradient, one for the weight's. Without a
        flow, a nominal batch of 32 and 32 positions in each spatial dimension are assumed.
        """
        steps = count_chain(chain, flow or _nominal_flow(chain))
        return sum(3 * self._forward_seconds(one, step) for one, step in zip(chain, steps, strict=True))

    def _forward_seconds(self, operation: Operation, step: StepCount) -> float:
        arithmetic = step.flops * _waste(operation) / self.flops_per_second
        traffic = 4 * step.values * _scatter(operation) / self.bytes_per_second
        return arithmetic + traffic + self.seconds_per_call


def _waste(operation: Operation) -> float:
    """Return how many times longer arithmetic takes in groups of few channels, which leave vector units idle.

    Measured on one core, in both memory formats, 256 channels in 2 to 256 groups: as if groups had at least 16 channels on
    either side, though never more than 32 times; kernels made for depthwise convolutions, one channel on both sides, take 8.
    """
    if operation.groups == 1:
        return 1.0
    if operation.is_depthwise:
        return 8.0
    sides = (operation.in_channels / operation.groups, operation.out_channels / operation.groups)
    return min(32.0, math.prod(max(1.0, 16 / side) for side in sides))


def _scatter(operation: Operation) -> float:
    """Return how many times longer memory takes where groups of few channels are mixed at each position.

    From the same measurement, between the two memory formats: with channels last, each group is read in short pieces.
    """
    if operation.groups == 1 or not operation.is_pointwise:
        return 1.0
    return min(8.0, max(1.0, 16 * operation.groups / min(operation.in_channels, operation.out_channels)))


def _nominal_flow(chain: Sequence[Operation]) -> Flow:
    """Return a batch of 32 whose kernels find 32 positions in each dimension, before stride and padding."""
    spans = ([step * (taps - 1) for step, taps in zip(one.dilation, one.kernel, strict=True)] for one in chain)
    return Flow(_NOMINAL_SAMPLES, tuple(_NOMINAL_SIZE + max(reach) for reach in zip(*spans, strict=True)))

"""Estimate the time of a site by arithmetic alone, without a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, Self, runtime_checkable

import torch

from tdfx.checks import is_number
from tdfx.cost.count import Flow, count_chain
from tdfx.cost.rates import rates
from tdfx.errors import PolicyError
from tdfx.factors.operation import Operation

_NOMINAL_SAMPLES = _NOMINAL_SIZE = 32


class Cost(Protocol):
    """Anything that knows how long a chain of operations takes in training."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the time of forward and backward through a chain, in seconds."""


Case = tuple[tuple[Operation, ...], Flow | None]
"""A chain of operations and what flows into it; None where that is not known."""


@runtime_checkable
class MeasuringCost(Cost, Protocol):
    """A cost that measures, and is therefore asked about many chains at once."""

    @property
    def modelled(self) -> Cost:
        """The cost that estimates at once, where nothing was measured."""

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype in which the training loop's autocast computes; None for what is in force."""

    def update_seconds(self, values: int, device: str) -> float:
        """Return how long an optimizer takes to update so many weight values."""

    def measure(self, groups: Iterable[Sequence[Case]], *, spent: float = 0.0) -> dict[Case, float]:
        """Return the times in seconds of groups of cases, each for one site, if measuring took ``spent`` seconds already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """Each operation takes the sum of its arithmetic, its memory traffic and a start-up time.

    Only ratios between chains are used. The defaults are those of one core of a server CPU in float32. A roofline, which
    takes the larger of the first two instead of their sum, overestimates the gain of small layers: measured on such a core,
    a 3×3 convolution of 64 channels, at 8×8 positions and batch 32, is 2.7 times faster at a quarter of its ranks; this sum
    predicts 2.7, the roofline 7.8.
    """

    flops_per_second: float = 1.5e11
    """Arithmetic rate in floating-point operations per second, positive."""
    bytes_per_second: float = 1e10
    """Memory rate in bytes per second, positive; values are counted as 4 bytes."""
    seconds_per_call: float = 5e-5
    """Time that any operation takes before it computes anything, in seconds, not negative."""

    @classmethod
    def of_machine(cls, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """Return the model with the numbers of this machine, for which three small layers are timed once, in about a second.

        Args:
            device: The device on which the model trains, as torch writes it.
            dtype: In which the layers compute.
        """
        return cls(**asdict(rates(device, dtype)))

    def __post_init__(self) -> None:
        settings = (self.flops_per_second, self.bytes_per_second, self.seconds_per_call)
        numbers = all(is_number(value) or value == math.inf for value in settings)
        if not numbers or min(settings) < 0 or 0 in settings[:2]:
            raise PolicyError(
                f"{self!r} has a rate that is not positive or a negative time: the first two are amounts per second, "
                f"the third is in seconds. Leave a field out to take its default."
            )

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        """Return the modelled time of one training step through a chain, in seconds.

        Backward counts as twice the forward: one product for the input's gradient, one for the weight's. What it computes
        again counts once more. Without a flow, a nominal batch of 32 and 32 positions in each spatial dimension are assumed.
        """
        forward = again = 0.0
        for operation, count in zip(chain, count_chain(chain, flow or _nominal_flow(chain)), strict=True):
            before = forward
            forward += count.flops * _group_slowdown(operation) / self.flops_per_second
            forward += 4 * count.values * _memory_slowdown(operation) / self.bytes_per_second + self.seconds_per_call
            again += forward - before if count.again else 0.0
        return 3 * forward + again


def _group_slowdown(operation: Operation) -> float:
    """Return how many times longer arithmetic takes in groups of few channels, which leave vector units idle.

    Measured on one core, in both memory formats, with 256 channels in 2 to 256 groups: arithmetic takes as long as if groups
    had at least 16 channels on either side, but at most 32 times as long, and 8 times in depthwise convolutions.
    """
    if operation.groups == 1:
        return 1.0
    if operation.is_depthwise:
        return 8.0
    sides = (operation.in_channels / operation.groups, operation.out_channels / operation.groups)
    return min(32.0, math.prod(max(1.0, 16 / side) for side in sides))


def _memory_slowdown(operation: Operation) -> float:
    """Return how many times longer memory traffic takes in pointwise maps of groups of few channels, measured likewise."""
    if operation.groups == 1 or not operation.is_pointwise:
        return 1.0
    return min(8.0, max(1.0, 16 * operation.groups / min(operation.in_channels, operation.out_channels)))


def _nominal_flow(chain: Sequence[Operation]) -> Flow:
    """Return a batch of 32 in which the largest kernel fits at 32 positions in each dimension."""
    spans = (
        [dilation * (taps - 1) for dilation, taps in zip(operation.dilation, operation.kernel, strict=True)]
        for operation in chain
    )
    return Flow(_NOMINAL_SAMPLES, tuple(_NOMINAL_SIZE + max(span) for span in zip(*spans, strict=True)))

"""When to switch: at a given step, after an epoch, or when the ranks have settled; and the check of all settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from torch.optim import Optimizer

from tdfx.api import rewrite
from tdfx.checks import check_whole, is_number
from tdfx.errors import OptimizerError, PolicyError, nearest
from tdfx.policies.policy import Policy


@dataclass(frozen=True, slots=True)
class AtStep:
    """Switch after a given number of training steps.

    Raises:
        PolicyError: The step is not a whole number of at least 1.

    Example:
        >>> import tdfx
        >>> tdfx.AtStep(500)
        AtStep(step=500)
    """

    step: int
    """Training steps before the switch, at least 1."""
    latest: int = field(default=0, repr=False)
    """As long as the learning rates rise, the switch waits, up to this step; 0 for no waiting."""

    def __post_init__(self) -> None:
        check_whole("step", self.step, "the training steps before the switch", "AtStep(500)")
        if self.latest:
            check_whole("latest", self.latest, "the steps at which not to wait any longer", "AtStep(500, latest=1000)")

    @property
    def at(self) -> int:
        """The step after which to switch."""
        return self.step


@dataclass(frozen=True, slots=True)
class AtEpoch:
    """Switch after a given number of epochs.

    Raises:
        PolicyError: A number is not whole, or below 1.

    Example:
        >>> import tdfx
        >>> tdfx.AtEpoch(3, steps_per_epoch=200).at
        600
    """

    epoch: int
    """Epochs before the switch, at least 1."""
    _: KW_ONLY
    steps_per_epoch: int
    """Training steps in one epoch, at least 1; ``len(loader)`` if each batch is a step."""

    def __post_init__(self) -> None:
        example = "AtEpoch(3, steps_per_epoch=len(loader))"
        check_whole("epoch", self.epoch, "the epochs before the switch", example)
        check_whole("steps_per_epoch", self.steps_per_epoch, "the training steps in one epoch", example)

    @property
    def at(self) -> int:
        """The step after which to switch."""
        return self.epoch * self.steps_per_epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """Switch when the ranks of at least half of the sites have stopped changing.

    A site has settled when its weight has turned since the first look and its stable rank has held over the last looks. At
    the first look at which at least half of the sites that the policy wants have settled, or at the timeout, all sites are
    switched together. The stable rank ``|W|² / s₁²`` is a cheap stand-in for the rank that a rule would choose.

    Source: Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos, *Cuttlefish: Low-Rank Model Training without All the
    Tuning*, MLSys 2023.

    Raises:
        PolicyError: A number is out of range.

    Example:
        >>> import tdfx
        >>> tdfx.Settled(every=200, timeout=20_000).tolerance
        0.02
    """

    every: int = 100
    """Training steps between two looks, at least 1; more are taken if looks would need over one percent of the time."""
    window: int = 3
    """Number of looks over which the stable rank must have held, at least 1, counted from the look before them."""
    tolerance: float = 0.02
    """Largest relative change of the stable rank over the window, positive; no unit."""
    moved: float = 0.1
    """How far a weight must have turned since the first look: sine of the angle, in [0, 1)."""
    timeout: int | None = None
    """Step at which to switch if the ranks have not settled by then, at least 1; None to wait as long as it takes."""

    def __post_init__(self) -> None:
        check_whole("every", self.every, "the training steps between two looks", "Settled(every=100)")
        check_whole("window", self.window, "the looks over which a rank must hold", "Settled(window=3)")
        if self.timeout is not None:
            check_whole("timeout", self.timeout, "the step at which waiting ends", "Settled(timeout=20_000)")
        if not (is_number(self.tolerance) and self.tolerance > 0):
            raise PolicyError(
                f"tolerance={self.tolerance!r} is not a positive number: it is the relative change of the stable rank "
                f"below which it counts as settled. Pass for example tolerance=0.02."
            )
        if not (is_number(self.moved) and 0 <= self.moved < 1):
            raise PolicyError(
                f"moved={self.moved!r} is not in [0, 1): it is the sine of the angle by which a weight must have turned "
                f"since the first look. Pass for example moved=0.1."
            )


When = AtStep | AtEpoch | Settled
"""What ``Switch`` takes as ``when=``."""


_EARLY = 100
"""Steps after which to switch where nothing else is said: before, too little of what will be needed shows."""
_EARLIEST, _LATEST = 0.03, 0.1
"""Shares of the training between which such a switch lies."""
_LEAST_EARLY = 10
"""Steps before such a switch at the least."""
_IN_WARM_UP = 0.2
"""Share of the training up to which such a switch waits for learning rates that rise: a network that has hardly moved yet
loses more."""
_PASSED_ON = frozenset(inspect.signature(rewrite).parameters) - {"model", "policy", "example_inputs", "optimizer"}
"""Arguments of ``rewrite`` that ``Switch.step`` passes on."""


def early(total_steps: int | None) -> AtStep:
    """Return an early step of a training: the earlier the switch, the more is saved, and a few steps show what is needed.

    Where the learning rates still rise then, the switch waits for them, up to a fifth of the training.

    >>> early(10_000), early(2_000), early(400), early(50)
    (AtStep(step=300), AtStep(step=100), AtStep(step=40), AtStep(step=10))

    Raises:
        PolicyError: The steps of the training are not known.
    """
    if total_steps is None:
        raise PolicyError(
            "Neither when= nor total_steps= is given, so no moment to switch can be chosen. Pass total_steps=, the steps of "
            "the whole training, or for example when=tdfx.AtStep(500)."
        )
    check_whole("total_steps", total_steps, "the steps of the whole training", "total_steps=10_000")
    earliest, latest = (round(share * total_steps) for share in (_EARLIEST, _LATEST))
    return AtStep(max(_LEAST_EARLY, earliest, min(_EARLY, latest)), latest=round(_IN_WARM_UP * total_steps))


def check_settings(
    policy: object,
    when: object,
    total_steps: int | None,
    recompile_seconds: float,
    rewarm: int,
    collect: int,
    factor_rate: float | None,
) -> None:
    """Raise PolicyError if a setting is out of range."""
    if not isinstance(policy, Policy):
        raise PolicyError(
            f"policy={policy!r} is a {type(policy).__name__}: a switch makes its plan later, from the weights of that "
            f"time, and needs a policy for it. Pass tdfx.Policy(rank=...)."
        )
    if not isinstance(when, When):
        raise PolicyError(
            f"when={when!r} does not say when to switch. Pass for example when=tdfx.AtStep(500) or "
            f"when=tdfx.Settled(timeout=20_000)."
        )
    if total_steps is not None:
        check_whole("total_steps", total_steps, "the steps of the whole training", "total_steps=10_000")
    if not (is_number(recompile_seconds) and recompile_seconds >= 0):
        raise PolicyError(
            f"recompile_seconds={recompile_seconds!r} is not a time of at least 0: it is the time to compile the "
            f"rewritten model, in seconds. Leave it out if nothing is compiled."
        )
    if collect != 0:
        check_whole("collect", collect, "the steps at which moments are collected, or 0 for none", "collect=8")
    if factor_rate is not None and not (is_number(factor_rate) and factor_rate > 0):
        raise PolicyError(
            f"factor_rate={factor_rate!r} is not a positive number: it is how many times the learning rate of the factors "
            f"is that of their group. Pass 1 for the same rate."
        )
    if rewarm != 0:
        check_whole("rewarm", rewarm, "the steps of the re-warm-up, or 0 for none", "rewarm=200")


def check_arguments(arguments: Iterable[str], rewarm: int, optimizer: Optimizer | Sequence[Optimizer] | None) -> None:
    """Raise an error unless ``rewrite`` takes the arguments of a step, and there is an optimizer if one is needed."""
    if unknown := sorted(set(arguments) - _PASSED_ON):
        raise PolicyError(
            f"step() got {unknown[0]!r}, which tdfx.rewrite does not take. Nearest: {nearest(unknown[0], _PASSED_ON)}."
        )
    if rewarm and optimizer is None:
        raise OptimizerError(
            f"rewarm={rewarm} scales learning rates, and step() got no optimizer=. Pass the optimizer that trains the "
            f"model, or leave rewarm out."
        )

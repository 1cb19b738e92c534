"""The least total error within a budget of time, operations, parameters or memory, over all sites together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from tdfx.checks import check_share, is_number
from tdfx.errors import PolicyError, TdfxWarning
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.spectrum import Spectrum

Measure = Literal["weights", "outputs", "curvature"]
"""Accepted as what a budget keeps small; all of them mean the error of the weights."""

_TIMES = {
    "speedup": (1.0, "how many times faster the step shall be. Pass for example speedup=2."),
    "seconds": (0.0, "what the step may take, in seconds. Pass for example seconds=0.25."),
}
"""The limits of time -> the value above which they are valid, and what they mean."""
_SIZES = ("flops", "parameters", "memory")
"""The limits that are a share or an amount."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Budget(RankRule):
    """Choose scheme and rank of every site so that together they keep a budget at the least total error.

    ``Policy(speedup=2)`` is short for ``Policy(rank=Budget(speedup=2))``. Several limits may be given; all are kept. A
    whole number is an amount, a float in (0, 1] a share of what the model has now.

    Example:
        >>> import tdfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 512))
        >>> plan = tdfx.plan(model, tdfx.Policy(parameters=0.5))
        >>> plan.parameters_after <= 0.5 * plan.parameters_before
        True
    """

    speedup: float | None = None
    """How many times faster the training step shall be, above 1: the whole step, where the cost measures and example inputs
    are given; otherwise the modelled time of all sites."""
    seconds: float | None = None
    """How long the training step may take, in seconds, positive; needs a cost that measures and example inputs."""
    flops: float | None = None
    """Forward operations of the sites: a share, or a whole number of them; needs example inputs."""
    parameters: float | None = None
    """Parameters of the whole model, with those of layers that are never rewritten: a share, or a whole number of them."""
    memory: float | None = None
    """Bytes that the sites add to a training step (weights, gradients, two moments, activations between factors): a share,
    or a whole number of them; needs example inputs."""
    error: Measure = "weights"
    """What is kept small: the sum of the sites' squared errors, relative to the norms of their weights; the other two values
    are accepted, with a warning, and mean the same."""
    strict: bool = True
    """True refuses a budget that cannot be kept and says what is possible, False goes nine tenths of the way to that."""
    floor: float = 0.0
    """Least share of the full rank to keep, in [0, 1]; where a scheme has several ranks, of their product, so that of two
    each keeps the square root of it. By the weights alone it holds where more than a tenth of the squared norm would be lost
    below it; in the metric of the loss it always holds."""
    noise_floor: float = 0.0
    """A floor, in [0, 1], for a weight whose spectrum is still that of noise by EVBMF; the higher of the two floors applies
    to it, and 1 keeps it as it is."""

    def __post_init__(self) -> None:
        if not self.limits:
            raise PolicyError("Budget() has no budget: pass for example Budget(speedup=2) or Budget(parameters=0.5).")
        for name, value in self.limits.items():
            least, meaning = _TIMES.get(name, (0.0, ""))
            if meaning and not (is_number(value) and least < value):
                raise PolicyError(f"{name}={value!r} is not a number above {least:g}: it is {meaning}")
            if not meaning and not (is_number(value) and value > 0 and (value <= 1 or value == int(value))):
                raise PolicyError(
                    f"{name}={value!r} is neither a share in (0, 1] nor a whole number of at least 1: it is what may be "
                    f"left. For half of what the model has pass {name}=0.5."
                )
        if self.error not in get_args(Measure):
            raise PolicyError(f"error={self.error!r} is not known: only 'weights' has a meaning. Leave it out.")
        if self.error != "weights":
            text = (
                f"error={self.error!r} was measured to be no better than the error of the weights and is treated as "
                f"error='weights'. Leave error out."
            )
            warnings.warn(text, TdfxWarning, stacklevel=3)
            object.__setattr__(self, "error", "weights")
        if not isinstance(self.strict, bool):
            text = f"strict={self.strict!r} is neither True nor False: it says if an impossible budget is refused. Pass"
            raise PolicyError(f"{text} strict=False to go most of the way to what is possible.")
        for name in ("floor", "noise_floor"):
            advice = f"For a quarter pass {name}=0.25; for no floor pass {name}=0."
            check_share(
                name, getattr(self, name), "the least part of each full rank to keep", advice, zero_allowed=True
            )

    def __repr__(self) -> str:
        """Return the call that makes the budget, without settings that have their default."""
        settings = ((setting.name, getattr(self, setting.name), setting.default) for setting in fields(self))
        return f"Budget({', '.join(f'{name}={value!r}' for name, value, default in settings if value != default)})"

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given, by name."""
        return {name: value for name in (*_TIMES, *_SIZES) if (value := getattr(self, name)) is not None}

    @property
    def is_of_time(self) -> bool:
        """True if the time of the training step is limited."""
        return self.speedup is not None or self.seconds is not None

    def least_ranks(self, full: Sequence[int], signal: bool) -> tuple[int, ...]:
        """Return the fewest ranks that the floors allow for a weight with or without a signal.

        >>> Budget(speedup=2, floor=0.25).least_ranks((64,), True), Budget(speedup=2, floor=0.25).least_ranks((64, 32), True)
        ((16,), (32, 16))
        """
        floor = self.floor if signal else max(self.floor, self.noise_floor)
        share = floor ** (1 / len(full))
        return tuple(math.ceil(share * most - 1e-9) for most in full)

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Raise: a budget is for all sites together, and cannot be kept by one of them.

        Raises:
            PolicyError: Always.
        """
        raise PolicyError(
            f"{self!r} cannot choose ranks for site {site!r} alone: it weighs all sites at once, and cannot be combined "
            f"with another rule. Use it as the policy's own rank, or give that site another rule."
        )


def Target(*, parameters: float | None = None, flops: float | None = None) -> Budget:  # noqa: N802
    """Return the budget for a share of the parameters or of the operations: the former name of such a budget.

    Args:
        parameters: Share of the model's parameters that may remain, in (0, 1].
        flops: Share of the sites' forward operations that may remain, in (0, 1].

    Raises:
        PolicyError: Not exactly one of the two is given, or it is not a share.
    """
    shares = {name: share for name, share in (("parameters", parameters), ("flops", flops)) if share is not None}
    if len(shares) != 1:
        raise PolicyError(
            f"Target(parameters={parameters!r}, flops={flops!r}) does not give exactly one of the two. "
            f"For half of the parameters pass Budget(parameters=0.5)."
        )
    ((name, share),) = shares.items()
    check_share(name, share, f"the part of the {name} that may remain", f"For half pass {name}=0.5.")
    budget = Budget(**{name: float(share)})  # type: ignore[arg-type]
    text = (
        f"Target({name}={share!r}) now returns {budget!r}, which finds the ranks of least error within that size; Target "
        f"gave all sites one common ratio. Pass tdfx.{budget!r} instead."
    )
    warnings.warn(text, TdfxWarning, stacklevel=2)
    return budget


DEFAULT_RULE = Budget(speedup=2.5, strict=False, floor=0.25, noise_floor=0.25)
"""The rank rule of a policy that gives none; tools/README.md says how it was chosen."""

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
"""What a budget once kept small; all of them are the error of the weights now."""

_LIMITS = ("speedup", "seconds", "flops", "parameters", "memory")
"""The fields that are budgets."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Budget(RankRule):
    """Choose scheme and rank of every site so that together they keep a budget at the least total error.

    ``Policy(speedup=2)`` is short for ``Policy(rank=Budget(speedup=2))``. Several budgets may be given; all are kept. A
    whole number is an amount, a float in (0, 1] a share of what the model has now.

    Example:
        >>> import tdfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 512))
        >>> made = tdfx.plan(model, tdfx.Policy(parameters=0.5))
        >>> made.parameters_after <= 0.5 * made.parameters_before
        True
    """

    speedup: float | None = None
    """How many times faster the model's training step shall be, above 1. With a cost that measures and example inputs the
    whole step counts, with all that is not rewritten; else the modelled time of all sites, decided by the budget or not."""
    seconds: float | None = None
    """How long the training step may take at most, positive, in seconds; needs a cost that measures and example inputs."""
    flops: float | None = None
    """Forward operations of the sites: a share, or a whole number of them; needs example inputs."""
    parameters: float | None = None
    """Parameters of the model: a share, or a whole number of them."""
    memory: float | None = None
    """Bytes that the sites add to a training step (weights, gradients, two moments, activations between factors): a share,
    or a whole number of them; needs example inputs."""
    error: Measure = "weights"
    """What is kept small: the sum of the sites' squared errors, each relative to its weight's norm. ``"outputs"`` and
    ``"curvature"`` are accepted, with a warning, and mean the same."""
    strict: bool = True
    """What becomes of a budget that cannot be kept: True refuses it and says what can be had, False goes nine tenths of the
    way that can be gone."""
    floor: float = 0.0
    """Least share of the full rank to keep in each mode, in [0, 1], of a weight that would lose more than a tenth of its
    square below that."""
    noise_floor: float = 0.0
    """The same, where it is more, for a weight whose spectrum is still that of noise by EVBMF; 1 keeps it as it is."""

    def __post_init__(self) -> None:
        if not self.limits:
            raise PolicyError(
                "Budget() has no budget: it keeps the error small within one. Pass for example Budget(speedup=2) or "
                "Budget(parameters=0.5)."
            )
        for name in ("speedup", "seconds"):
            value = getattr(self, name)
            least = 1.0 if name == "speedup" else 0.0
            if value is not None and not (is_number(value) and least < value < math.inf):
                raise PolicyError(
                    f"{name}={value!r} is not a number above {least:g}: it is "
                    + (
                        "how many times faster the step shall be. Pass for example speedup=2."
                        if name == "speedup"
                        else "what the step may take, in seconds. Pass for example seconds=0.25."
                    )
                )
        for name in ("flops", "parameters", "memory"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and _is_amount(value)):
                raise PolicyError(
                    f"{name}={value!r} is neither a share in (0, 1] nor a whole number of at least 1: it is what may be "
                    f"left. For half of what the model has pass {name}=0.5."
                )
        if self.error not in get_args(Measure):
            raise PolicyError(
                f"error={self.error!r} is not known: what is kept small is the error of the 'weights'. Leave error out."
            )
        if self.error != "weights":
            warnings.warn(
                f"error={self.error!r} was measured to be no better than the error of the weights and is treated as "
                f"error='weights'. Leave error out.",
                TdfxWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "error", "weights")
        if not isinstance(self.strict, bool):
            raise PolicyError(
                f"strict={self.strict!r} is neither True nor False: it says whether a budget that cannot be kept is "
                f"refused. Pass strict=False to go as far as can be gone."
            )
        for name in ("floor", "noise_floor"):
            check_share(
                name,
                getattr(self, name),
                "the least part of each full rank to keep",
                f"For a quarter pass {name}=0.25; for no floor pass {name}=0.",
                zero_allowed=True,
            )

    def __repr__(self) -> str:
        """Return what was given, and leave out what is as usual."""
        values = ((one, getattr(self, one.name)) for one in fields(self))
        return f"Budget({', '.join(f'{one.name}={value!r}' for one, value in values if value != one.default)})"

    @property
    def limits(self) -> dict[str, float]:
        """The budgets that are given, by name."""
        found = {name: getattr(self, name) for name in _LIMITS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def is_of_time(self) -> bool:
        """True if the time of the step counts."""
        return self.speedup is not None or self.seconds is not None

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Raise: one site cannot say what all of them come to.

        Raises:
            PolicyError: Always.
        """
        raise PolicyError(
            f"{self!r} cannot choose ranks for site {site!r} alone: it weighs all sites at once, and goes with no other "
            f"rule and in no override. Use it as the policy's own rank, or give that site another rule."
        )


def _is_amount(value: float) -> bool:
    return value >= 1 if isinstance(value, int) else 0 < value <= 1 or (value > 1 and value == int(value))


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
    warnings.warn(
        f"Target({name}={share!r}) now returns {budget!r}, which finds the ranks of least error within that size; Target "
        f"gave all sites one common ratio. Pass tdfx.{budget!r} instead.",
        TdfxWarning,
        stacklevel=2,
    )
    return budget


DEFAULT_RULE = Budget(speedup=2.0, strict=False, floor=0.125, noise_floor=0.25)
"""The rank rule of a policy that gives none; chosen by ``tools/study_default.py``."""

"""One share of the full rank for all sites, such that together they come to a given size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tdfx.checks import check_share
from tdfx.errors import PolicyError
from tdfx.ranks.ratio import Ratio
from tdfx.ranks.rule import Choice, RankRule, Total
from tdfx.ranks.spectrum import Spectrum

_LOWEST = 1e-9
"""A share at which every site is at its lowest rank."""
_HALVINGS = 30
"""The shares at which the ranks of two sites change lie at least 1 / (2 m n) apart for full ranks m and n, so that 2**-30
tells them apart up to full ranks of 20,000."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Target(RankRule):
    """Give all sites that the policy decides one common ``Ratio``, the largest at which together they meet a target.

    What is counted is what the plan will hold: ranks as they are rounded, and sites that stay dense, because a rewrite
    would not pay or because another rule keeps them, as dense. Exactly one of the two targets is given. The plan's notes
    say which ratio it came to.

    Example:
        >>> import tdfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 512))
        >>> made = tdfx.plan(model, tdfx.Policy(rank=Target(parameters=0.5), min_gain=0))
        >>> made.notes
        ('Target(parameters=0.5) came to Ratio(of=0.28)',)
    """

    parameters: float | None = None
    """Share of the sites' weight values that may remain, in (0, 1]."""
    flops: float | None = None
    """Share of the sites' forward operations that may remain, in (0, 1]; needs example inputs."""

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.flops is None):
            raise PolicyError(
                f"Target(parameters={self.parameters!r}, flops={self.flops!r}) does not give exactly one of the two. "
                f"For half of the parameters pass Target(parameters=0.5)."
            )
        for name, share in (("parameters", self.parameters), ("flops", self.flops)):
            if share is not None:
                check_share(name, share, f"the part of the sites' {name} that may remain", f"For half pass {name}=0.5.")

    def __repr__(self) -> str:
        return f"Target({self._name}={self._share!r})"

    @property
    def _name(self) -> str:
        return "flops" if self.parameters is None else "parameters"

    @property
    def _share(self) -> float:
        share = self.flops if self.parameters is None else self.parameters
        assert share is not None
        return share

    @property
    def reads_values(self) -> bool:
        """False: what it comes to is a ``Ratio``."""
        return False

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Raise: one site cannot say what all of them come to.

        Raises:
            PolicyError: Always.
        """
        raise PolicyError(
            f"{self!r} cannot choose ranks for site {site!r} alone: it sees all sites at once, in tdfx.plan and "
            f"tdfx.rewrite. For one site use Ratio."
        )

    def resolve(self, dense: Total, after: Callable[[RankRule], Total]) -> RankRule:
        """Return the largest ratio whose total is at most the target, by bisection.

        Raises:
            PolicyError: Not even the lowest ranks meet the target, or operations were not counted.
        """
        whole = self._count(dense)

        def share_at(ratio: float) -> float:
            return self._count(after(Ratio(of=ratio))) / max(whole, 1)

        low, high = _LOWEST, 1.0
        least = share_at(low)
        if least > self._share:
            raise PolicyError(
                f"{self!r} cannot be met: the least that the sites can come to is {_up(least):g} of their {self._name} now. "
                f"Ask for that, let ranks be lower with Policy(round_to=1), or exclude sites that stay dense."
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if share_at(middle) <= self._share else (low, middle)
        return Ratio(of=_shortest(low, share_at))

    def _count(self, total: Total) -> int:
        count = total.flops if self.parameters is None else total.parameters
        if count is None:
            raise PolicyError(
                f"{self!r} counts operations, and these depend on what flows through each site. Pass example_inputs=... "
                f"(--input on the command line), or give Target(parameters=...)."
            )
        return count


def _up(share: float) -> float:
    """Return a share with three decimals that is not below it.

    >>> _up(0.0621), _up(0.5)
    (0.063, 0.5)
    """
    return math.ceil(share * 1000) / 1000


def _shortest(value: float, result: Callable[[float], float]) -> float:
    """Return the number of fewest decimals in (0, 1] with the same result.

    >>> _shortest(0.123456, lambda ratio: round(64 * ratio))
    0.12
    """
    trials = (round(value, digits) for digits in range(1, 12))
    return next((trial for trial in trials if 0 < trial <= 1 and result(trial) == result(value)), value)

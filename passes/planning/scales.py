"""How many times longer than estimated sites take, learned from those of a model that were timed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tdfx.cost.modelled import Cost
from tdfx.passes.planning.proposals import Candidate
from tdfx.passes.planning.site_cost import current_chain
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.program import Site

Lowest = Mapping[str, Candidate]
"""What takes least of each scheme, by its name."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What estimates are multiplied with, so that those for sites that were not timed compare with what was."""

    now: float = 1.0
    """How many times longer sites take as they are, all together."""
    lowest: Mapping[str, float] = field(default_factory=dict)
    """By scheme: how many times longer still they take at the lowest ranks."""
    measured: bool = False
    """Whether any site was timed."""

    @classmethod
    def learned(
        cls, times: SiteTimes, cost: Cost, sites: Sequence[tuple[Site, Lowest]], step_seconds: float | None
    ) -> Scales:
        """Compare what is known of some sites with what is estimated for them.

        Args:
            times: What is known.
            cost: By which.
            sites: With what takes least of each scheme.
            step_seconds: Time of the model's step. Where no site was timed they are taken to be all of it: a budget is then
                missed, if it is, by what the rest of the step takes, and no site is cut further than was asked for.
        """
        each = [(site, options, *_pair(times, cost, site)) for site, options in sites]
        known = [(site, options, now, guess) for site, options, now, guess in each if now is not None]
        if not known:
            guesses = sum(guess for *_, guess in each)
            return cls() if step_seconds is None or guesses == 0 else cls(step_seconds / guesses)
        schemes = dict.fromkeys(name for _, options, *_ in known for name in options)
        found = {name: _still_longer(times, cost, name, known) for name in schemes}
        lowest = {name: value for name, value in found.items() if value is not None}
        return cls(_ratio((now, guess) for _, _, now, guess in known), lowest, measured=True)


def _pair(times: SiteTimes, cost: Cost, site: Site, option: Candidate | None = None) -> tuple[float | None, float]:
    """Return the time of a site, as it is or as it may become, where that is known, and the estimate for it."""
    chain = current_chain(site) if option is None else option.chain
    return times.measured(cost, site, chain), times.estimate(cost, site, chain)


def _still_longer(
    times: SiteTimes, cost: Cost, name: str, known: Iterable[tuple[Site, Lowest, float, float]]
) -> float | None:
    """Return how many times longer sites take than estimated in one scheme, beside how many times longer as they are."""
    before, after = [], []
    for site, options, now, guess in known:
        if name in options:
            measured, estimate = _pair(times, cost, site, options[name])
            if measured is not None:
                before.append((now, guess))
                after.append((measured, estimate))
    return _ratio(after) / _ratio(before) if after else None


def _ratio(pairs: Iterable[tuple[float, float]]) -> float:
    own = list(pairs)
    return sum(measured for measured, _ in own) / sum(guess for _, guess in own)

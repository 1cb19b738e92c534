"""Estimated times in the scale of measured ones: what a few measurements say of everything that was not measured."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tdfx.cost.modelled import Cost
from tdfx.passes.planning.site_cost import Candidate, Chain, current_chain
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.program import Site

Lowest = Mapping[str, Candidate]
"""Scheme name -> the candidate of that scheme that takes the least time."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What an estimate is multiplied with to be comparable with measured times: learned from the sites that were timed."""

    times: SiteTimes
    cost: Cost
    dense: float = 1.0
    """How many times longer than estimated the sites take as they are now, all together."""
    lowest: Mapping[str, float] = field(default_factory=dict)
    """Scheme name -> the same at the lowest ranks, relative to ``dense``."""
    measured: bool = False
    """Whether any site was timed."""
    caution: float = 1.0
    """How many times longer than estimated an unmeasured candidate is assumed to take."""

    def learn(self, sites: Sequence[tuple[Site, Lowest]], step_seconds: float | None) -> Calibration:
        """Return the calibration by what has been measured of some sites, each given with every scheme's fastest candidate.

        Where no site was timed, the sites are assumed to be all of the step: a budget is then missed, if at all, by the
        rest of the step, and no site is cut further than was asked for.
        """
        pairs = [(site, lowest, *self._pair(site, current_chain(site))) for site, lowest in sites]
        timed = [(site, lowest, now, estimate) for site, lowest, now, estimate in pairs if now is not None]
        if not timed:
            total = sum(estimate for *_, estimate in pairs)
            return replace(self, dense=1.0 if step_seconds is None or total == 0 else step_seconds / total)
        names = dict.fromkeys(name for _, lowest, *_ in timed for name in lowest)
        factors = {name: self._factor_of_lowest(name, timed) for name in names}
        return replace(
            self,
            dense=_ratio((now, estimate) for _, _, now, estimate in timed),
            lowest={name: factor for name, factor in factors.items() if factor is not None},
            measured=True,
        )

    def seconds(self, site: Site, chain: Chain) -> float:
        """Return the time of a site in one way to compute it: measured, or estimated in the scale of all sites."""
        measured, estimate = self._pair(site, chain)
        return self.dense * estimate if measured is None else measured

    def estimated(self, site: Site, chain: Chain) -> float:
        """Return the estimated time of a site in one way to compute it, in the scale of all sites."""
        return self.dense * self.times.estimate(self.cost, site, chain)

    def of_site(self, site: Site, candidates: Iterable[Candidate], lowest: Lowest) -> SiteCalibration:
        """Return the calibration of one site, by what was measured of its own candidates.

        ``lowest`` has the fastest of each scheme; it is empty where nothing is to be learned from other sites.
        """
        now, estimate_now = self._pair(site, current_chain(site))
        dense = self.dense if now is None else now / estimate_now
        points: dict[str, list[tuple[float, float]]] = {}
        for candidate in candidates:
            measured, estimate = self._pair(site, candidate)
            if measured is not None:
                points.setdefault(candidate.scheme.name, []).append((estimate, measured / estimate))
        for name, factor in self.lowest.items():
            if name in lowest and name not in points:
                points[name] = [(self._pair(site, lowest[name])[1], dense * factor)]
        for scheme_points in points.values():
            # A site that is hardly cut takes as long, relative to its estimate, as one that is not cut.
            scheme_points.append((estimate_now, dense))
            scheme_points.sort()
        return SiteCalibration(self, site, dense, points)

    def _pair(self, site: Site, chain: Chain) -> tuple[float | None, float]:
        """Return the measured time of a site in one way to compute it, None if unknown, and the estimate."""
        return self.times.measured(self.cost, site, chain), self.times.estimate(self.cost, site, chain)

    def _factor_of_lowest(self, name: str, timed: Iterable[tuple[Site, Lowest, float, float]]) -> float | None:
        """Return how many times longer than estimated sites take at a scheme's lowest ranks, relative to as they are."""
        before, after = [], []
        for site, lowest, now, estimate_now in timed:
            if name in lowest:
                measured, estimate = self._pair(site, lowest[name])
                if measured is not None:
                    before.append((now, estimate_now))
                    after.append((measured, estimate))
        return _ratio(after) / _ratio(before) if after else None


@dataclass(frozen=True, slots=True)
class SiteCalibration:
    """The times of one site's candidates: measured, or estimated in the scale of what was measured of the same scheme."""

    calibration: Calibration
    site: Site
    dense: float
    """How many times longer than estimated the site takes as it is now."""
    points: Mapping[str, Sequence[tuple[float, float]]]
    """Scheme name -> sorted pairs of an estimate and how many times longer the measurement was."""

    def seconds(self, candidate: Candidate | None) -> float:
        """Return the time of a candidate in seconds, or of the site as it is for None."""
        measured, estimate = self.calibration._pair(self.site, candidate or current_chain(self.site))
        if measured is not None:
            return measured
        if candidate is None:
            return estimate * self.dense
        points = self.points.get(candidate.scheme.name, [])
        factor = _interpolate(points, estimate) if points else self.dense
        return self.calibration.caution * estimate * factor


def _ratio(pairs: Iterable[tuple[float, float]]) -> float:
    measured, estimates = zip(*pairs, strict=True)
    return float(sum(measured) / sum(estimates))


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolate between sorted points so that the times, products of both, lie on a line; outside, take the nearest.

    The time of an operation grows linearly with its work, from the overhead of doing next to nothing.

    >>> _interpolate([(1.0, 2.0), (3.0, 1.0)], 2.0), _interpolate([(1.0, 2.0), (3.0, 1.0)], 9.0)
    (1.25, 1.0)
    """
    place = bisect.bisect([x for x, _ in points], at)
    if place in (0, len(points)):
        return points[max(0, place - 1)][1]
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    return (x0 * y0 + (x1 * y1 - x0 * y0) * (at - x0) / (x1 - x0)) / at

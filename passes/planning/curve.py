"""The times of a site's many options, of which a few were measured."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from tdfx.cost.modelled import Cost
from tdfx.passes.planning.proposals import Candidate
from tdfx.passes.planning.scales import Lowest, Scales
from tdfx.passes.planning.site_cost import current_chain
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.program import Site


class Curve:
    """The times of one site's options: measured, or estimated in the scale of those of their scheme that were measured.

    Where none of the scheme was, that of the other sites of the model counts.
    """

    def __init__(
        self,
        times: SiteTimes,
        cost: Cost,
        site: Site,
        options: Iterable[Candidate],
        *,
        lowest: Lowest,
        scales: Scales,
        caution: float = 1.0,
    ) -> None:
        """Take what is known now of a site's options by a cost.

        Args:
            times: What is known.
            cost: By which.
            site: Whose options they are.
            options: All of them.
            lowest: Those that take least, of each scheme.
            scales: How many times longer sites take than estimated, where nothing is known of this one.
            caution: How many times longer what is not known is taken to be.
        """
        self.times, self.cost, self.site, self.caution = times, cost, site, caution
        self.points: dict[str, list[tuple[float, float]]] = {}
        """Of each scheme the estimates of what was measured, sorted, and how many times longer each takes in fact."""
        for option in options:
            measured = self.times.measured(self.cost, self.site, option.chain)
            if measured is not None:
                guess = self.times.estimate(self.cost, self.site, option.chain)
                self.points.setdefault(option.scheme.name, []).append((guess, measured / guess))
        guess = self.times.estimate(cost, site, current_chain(site))
        now = self.times.measured(cost, site, current_chain(site))
        self.scale = scales.now if now is None else now / guess
        """How many times longer the site as it is takes than estimated."""
        for name, still in scales.lowest.items():
            if name in lowest and name not in self.points:
                least = self.times.estimate(cost, site, lowest[name].chain)
                self.points[name] = [(least, self.scale * still)]
        for points in self.points.values():
            # What is next to nothing cut takes as long, in proportion, as what is not cut at all.
            points.append((guess, self.scale))
            points.sort()

    def seconds(self, option: Candidate | None) -> float:
        """Return the time of an option, or of the site as it is."""
        chain = current_chain(self.site) if option is None else option.chain
        measured = self.times.measured(self.cost, self.site, chain)
        if measured is not None:
            return measured
        guess = self.times.estimate(self.cost, self.site, chain)
        if option is None:
            return guess * self.scale
        points = self.points.get(option.scheme.name, [])
        return self.caution * guess * (_between(points, guess) if points else self.scale)


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolate between sorted points such that times, the products of both, lie on a line; take the nearest outside.

    What an operation takes grows with its work, from what it takes to do next to nothing.

    >>> _between([(1.0, 2.0), (3.0, 1.0)], 2.0), _between([(1.0, 2.0), (3.0, 1.0)], 9.0)
    (1.25, 1.0)
    """
    place = bisect.bisect([x for x, _ in points], at)
    if place in (0, len(points)):
        return points[max(0, place - 1)][1]
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    return (x0 * y0 + (x1 * y1 - x0 * y0) * (at - x0) / (x1 - x0)) / at

"""How long sites take, as they are and factorized: by arithmetic while there is much to choose from, then by measurement."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from tdfx.cost.modelled import Case, Cost, MeasuringCost
from tdfx.distributed.processes import Lead
from tdfx.passes.planning.site_cost import Chain, calls_of, current_chain
from tdfx.passes.program import Site


@dataclass(frozen=True, slots=True)
class TimingRequest:
    """A site, and the chains that compete for its place."""

    cost: Cost
    """What says how long they take."""
    site: Site
    chains: tuple[Chain, ...]


class SiteTimes:
    """The times of chains, by the cost of each policy.

    A cost that measures is asked once for all that is wanted, by one of the processes that train the model; all others hear
    what it found. ``estimate`` and ``estimated_gain`` never measure.
    """

    def __init__(self, lead: Lead, spent: float = 0.0) -> None:
        """Take who measures, and the seconds that measuring for the same plan has taken already."""
        self.lead = lead
        self._known: dict[object, dict[Case, float]] = {}
        self._spent: dict[object, float] = defaultdict(lambda: spent)

    def prepare(self, wanted: Iterable[TimingRequest]) -> None:
        """Let the costs that measure do so for some sites, each as it is now first and then the chains."""
        costs: dict[object, MeasuringCost] = {}
        groups: dict[object, list[list[Case]]] = {}
        for one in wanted:
            if isinstance(one.cost, MeasuringCost):
                costs[_key(one.cost)] = one.cost
                groups.setdefault(_key(one.cost), []).extend(_groups(one))
        for key, cost in costs.items():
            began = time.perf_counter()
            found = self.lead.do(partial(cost.measure, groups[key], spent=self._spent[key]))
            self._spent[key] += time.perf_counter() - began
            self._known.setdefault(key, {}).update(found)

    def measured(self, cost: Cost, site: Site, chain: Chain) -> float | None:
        """Return the time of a training step of a site, over all its calls; None where nothing was prepared for it."""
        known = self._known.get(_key(cost), {})
        found = [known.get((tuple(steps), flow)) for steps, flow in calls_of(site, chain)]
        times = [one for one in found if one is not None]
        return sum(times) if len(times) == len(found) else None

    def gain(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return how many times faster the site's step becomes: as measured, or estimated where nothing was prepared."""
        before, after = self.measured(cost, site, current_chain(site)), self.measured(cost, site, chain)
        if before is None or after is None:
            return self.estimated_gain(cost, site, chain)
        return before / after

    def estimate(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return the time of a training step of a site by arithmetic, where the cost would have to measure."""
        model = cost.modelled if isinstance(cost, MeasuringCost) else cost
        return sum(model.seconds(steps, flow) for steps, flow in calls_of(site, chain))

    def estimated_gain(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return how many times faster the site's step becomes by arithmetic."""
        return self.estimate(cost, site, current_chain(site)) / self.estimate(cost, site, chain)


def _key(cost: Cost) -> object:
    """Return what equal costs have in common, so that they share their times and their budget."""
    return cost if isinstance(cost, Hashable) else id(cost)


def _groups(wanted: TimingRequest) -> Iterable[list[Case]]:
    """Yield for each call of a site what competes for it."""
    each = [[(tuple(steps), flow) for steps, flow in calls_of(wanted.site, chain)] for chain in _with_now(wanted)]
    return (list(group) for group in zip(*each, strict=True))


def _with_now(wanted: TimingRequest) -> Sequence[Chain]:
    return (current_chain(wanted.site), *wanted.chains)

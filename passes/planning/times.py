"""How long sites take, as they are and factorized: estimated by arithmetic, or measured where that was asked for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from tdfx.cost.modelled import Case, Cost, MeasuringCost
from tdfx.distributed.processes import Processes
from tdfx.passes.planning.site_cost import Chain, calls_of, current_chain
from tdfx.passes.program import Site


@dataclass(frozen=True, slots=True)
class TimingRequest:
    """A site and the chains that compete for its place."""

    cost: Cost
    site: Site
    chains: tuple[Chain, ...]


class SiteTimes:
    """The times of sites, by the cost of each policy.

    A cost that measures is asked once for all requests, on the first process; the others receive its times.
    ``estimate`` and ``estimated_gain`` never measure. Measuring for the same plan has taken ``spent`` seconds already.
    """

    def __init__(self, processes: Processes, spent: float = 0.0) -> None:
        self.processes = processes
        self._times: dict[object, dict[Case, float]] = {}
        self._measured: dict[tuple[object, str, Chain], float | None] = {}
        self._estimates: dict[tuple[object, str, Chain], float] = {}
        self._spent: dict[object, float] = defaultdict(lambda: spent)

    def prepare(self, requests: Iterable[TimingRequest]) -> None:
        """Let the costs that measure time some sites: each as it is now first, then its chains."""
        costs: dict[object, MeasuringCost] = {}
        groups: dict[object, list[list[Case]]] = {}
        for request in requests:
            if isinstance(request.cost, MeasuringCost):
                costs[_key(request.cost)] = request.cost
                groups.setdefault(_key(request.cost), []).extend(_groups(request))
        for key, cost in costs.items():
            began = time.perf_counter()
            measured = self.processes.on_rank0(partial(cost.measure, groups[key], spent=self._spent[key]))
            self._spent[key] += time.perf_counter() - began
            self._times.setdefault(key, {}).update(measured)
            self._measured.clear()

    def measured(self, cost: Cost, site: Site, chain: Chain) -> float | None:
        """Return the time of a training step of a site over all its calls, in seconds; None if it was not measured."""
        key = (_key(cost), site.name, chain)
        if key not in self._measured:
            times = self._times.get(_key(cost), {})
            calls = [times.get((tuple(steps), flow)) for steps, flow in calls_of(site, chain)]
            known = [seconds for seconds in calls if seconds is not None]
            self._measured[key] = sum(known) if len(known) == len(calls) else None
        return self._measured[key]

    def gain(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return how many times faster the site's step becomes: as measured, or estimated if it was not."""
        before, after = self.measured(cost, site, current_chain(site)), self.measured(cost, site, chain)
        return self.estimated_gain(cost, site, chain) if before is None or after is None else before / after

    def estimate(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return the time of a training step of a site in seconds, by arithmetic."""
        key = (_key(cost), site.name, chain)
        if key not in self._estimates:
            model = cost.modelled if isinstance(cost, MeasuringCost) else cost
            self._estimates[key] = sum(model.seconds(steps, flow) for steps, flow in calls_of(site, chain))
        return self._estimates[key]

    def estimated_gain(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return how many times faster the site's step becomes, by arithmetic."""
        return self.estimate(cost, site, current_chain(site)) / self.estimate(cost, site, chain)


def _key(cost: Cost) -> object:
    """Return a key under which equal costs share their times and their measuring time."""
    return cost if isinstance(cost, Hashable) else id(cost)


def _groups(request: TimingRequest) -> Iterable[list[Case]]:
    """Yield for each call of a site the computations that compete for it, the present one first."""
    chains: Sequence[Chain] = (current_chain(request.site), *request.chains)
    cases = [[(tuple(steps), flow) for steps, flow in calls_of(request.site, chain)] for chain in chains]
    return (list(group) for group in zip(*cases, strict=True))

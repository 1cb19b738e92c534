"""How long sites take, as they are and factorized: estimated by arithmetic, or measured where that was asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tdfx.cost.modelled import Case, Cost, MeasuringCost
from tdfx.cost.waiting import working_time
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
        self._spent_before = spent
        self._known: dict[int, tuple[Cost, _CostTimes]] = {}
        self._by_key: dict[object, _CostTimes] = {}

    def prepare(self, requests: Iterable[TimingRequest]) -> None:
        """Let the costs that measure time some sites: each as it is now first, then its chains."""
        costs: dict[int, tuple[MeasuringCost, _CostTimes]] = {}
        groups: defaultdict[int, list[list[Case]]] = defaultdict(list)
        for request in requests:
            if isinstance(request.cost, MeasuringCost):
                times = self._of(request.cost)
                costs[id(times)] = request.cost, times
                groups[id(times)].extend(_groups(request))
        for key, (cost, times) in costs.items():
            with working_time() as worked:
                measured = self.processes.on_rank0(partial(cost.measure, groups[key], spent=times.spent))
                times.spent += worked()
            times.seconds.update(measured)
            times.measured.clear()

    def measured(self, cost: Cost, site: Site, chain: Chain) -> float | None:
        """Return the time of a training step of a site over all its calls, in seconds; None if it was not measured."""
        times = self._of(cost)
        key = (site.name, chain)
        if key not in times.measured:
            calls = [times.seconds.get(case) for case in times.cases_of(site, chain)]
            known = [seconds for seconds in calls if seconds is not None]
            times.measured[key] = sum(known) if len(known) == len(calls) else None
        return times.measured[key]

    def gain(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return how many times faster the site's step becomes: as measured, or estimated if it was not."""
        before, after = self.measured(cost, site, current_chain(site)), self.measured(cost, site, chain)
        return self.estimated_gain(cost, site, chain) if before is None or after is None else before / after

    def estimate(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return the time of a training step of a site in seconds, by arithmetic."""
        times = self._of(cost)
        key = (site.name, chain)
        if key not in times.estimates:
            times.estimates[key] = sum(times.model.seconds(steps, flow) for steps, flow in times.cases_of(site, chain))
        return times.estimates[key]

    def estimated_gain(self, cost: Cost, site: Site, chain: Chain) -> float:
        """Return how many times faster the site's step becomes, by arithmetic."""
        return self.estimate(cost, site, current_chain(site)) / self.estimate(cost, site, chain)

    def _of(self, cost: Cost) -> _CostTimes:
        """Return the times of a cost; equal costs share them."""
        if id(cost) not in self._known:
            key = cost if isinstance(cost, Hashable) else id(cost)
            if key not in self._by_key:
                model = cost.modelled if isinstance(cost, MeasuringCost) else cost
                self._by_key[key] = _CostTimes(model, self._spent_before)
            self._known[id(cost)] = cost, self._by_key[key]  # with the cost, whose address is not used again then
        return self._known[id(cost)][1]


@dataclass(slots=True)
class _CostTimes:
    """What is known by one cost; a plan asks for the same times of a thousand candidates again and again."""

    model: Cost
    """The cost that estimates."""
    spent: float
    """Seconds that measuring has taken."""
    seconds: dict[Case, float] = field(default_factory=dict)
    measured: dict[tuple[str, Chain], float | None] = field(default_factory=dict)
    estimates: dict[tuple[str, Chain], float] = field(default_factory=dict)
    cases: dict[tuple[str, Chain], tuple[Case, ...]] = field(default_factory=dict)

    def cases_of(self, site: Site, chain: Chain) -> tuple[Case, ...]:
        """Return what the calls of a site compute by a chain."""
        key = (site.name, chain)
        if key not in self.cases:
            self.cases[key] = tuple((tuple(steps), flow) for steps, flow in calls_of(site, chain))
        return self.cases[key]


def _groups(request: TimingRequest) -> Iterable[list[Case]]:
    """Yield for each call of a site the computations that compete for it, the present one first."""
    chains: Sequence[Chain] = (current_chain(request.site), *request.chains)
    cases = [[(tuple(steps), flow) for steps, flow in calls_of(request.site, chain)] for chain in chains]
    return (list(group) for group in zip(*cases, strict=True))

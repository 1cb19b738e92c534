"""Decisions for sites whose ranks a rule reads from the weight, one site at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from tdfx.distributed.processes import Processes, Task
from tdfx.passes.planning.proposals import Gain, Proposal, SiteWish, keep_unread, propose
from tdfx.passes.planning.site_cost import Candidate
from tdfx.passes.planning.spectra import SpectrumCache, unread
from tdfx.passes.planning.times import SiteTimes, TimingRequest
from tdfx.passes.planning.weights import has_values
from tdfx.passes.program import Site
from tdfx.plans.plan import SitePlan
from tdfx.progress import progress
from tdfx.ranks.rule import Choice

_DOUBTFUL = 2.0
"""A site is timed before its weight is read if its estimated gain at the lowest ranks is below this times ``min_gain``."""


def decide_by_rule(
    wishes: Sequence[SiteWish], times: SiteTimes, cache: SpectrumCache, processes: Processes
) -> list[SitePlan]:
    """Return the decisions for sites that no budget decides: ranks by each policy's rule, then by time whether they pay.

    Each weight is read by one of the processes, whose cache keeps the spectra of sites that will be split.
    """
    times.prepare(_doubtful(wishes, times))
    # A cost of the user's may answer differently on each process, and all must read the same weights next.
    kept = processes.broadcast_object([keep_unread(wish, _gain(wish, times)) for wish in wishes])
    unread_wishes = [wish for wish, decision in zip(wishes, kept, strict=True) if decision is None]
    proposals = iter(_proposals(unread_wishes, times, cache, processes))
    decisions: list[SitePlan | Proposal] = [next(proposals) if decision is None else decision for decision in kept]
    timed = [each for each in decisions if isinstance(each, Proposal) and each.wish.is_timed]
    times.prepare(TimingRequest(each.wish.in_force.cost, each.wish.site, each.candidates) for each in timed)
    settled: list[SitePlan] = processes.broadcast_object(
        [_settle(each, times) if isinstance(each, Proposal) else each for each in decisions]
    )
    for plan, proposal in zip(settled, decisions, strict=True):
        if isinstance(proposal, Proposal) and plan.scheme != proposal.candidates[0].scheme.name:
            cache.evict(proposal.wish.site)
    return _with_errors(wishes, settled, cache, processes)


def _doubtful(wishes: Sequence[SiteWish], times: SiteTimes) -> Iterator[TimingRequest]:
    """Yield the sites that may be too small to gain enough, by arithmetic, at the lowest ranks."""
    for wish in wishes:
        if wish.site.reason is None and wish.scheme is not None and wish.is_timed and not wish.in_force.rank.exact:
            lowest, cost = wish.lowest(), wish.in_force.cost
            if times.estimated_gain(cost, wish.site, lowest) < _DOUBTFUL * wish.in_force.min_gain:
                yield TimingRequest(cost, wish.site, (lowest,))


def _gain(wish: SiteWish, times: SiteTimes) -> Gain:
    return partial(times.gain, wish.policy.cost) if wish.policy is not None else lambda site, chain: 1.0


def _settle(proposal: Proposal, times: SiteTimes) -> SitePlan:
    return proposal.settle(_gain(proposal.wish, times), partial(times.estimated_gain, proposal.wish.in_force.cost))


def _proposals(
    wishes: Sequence[SiteWish], times: SiteTimes, cache: SpectrumCache, processes: Processes
) -> list[SitePlan | Proposal]:
    tasks = [Task(partial(_read, wish, cache), wish.site.weights) for wish in wishes if has_values(wish.site)]
    results = iter(processes.map_tasks(tasks))
    proposals = []
    with progress("reading weights", len(wishes)) as advance:
        for wish in wishes:
            choice, error = next(results) if has_values(wish.site) else (_choose_unread(wish), None)
            proposals.append(propose(wish, choice, error, _gain(wish, times)))
            advance(1)
    return proposals


def _read(wish: SiteWish, cache: SpectrumCache, *weights: Tensor) -> tuple[Choice, float | None]:
    """Return the ranks that a rule chooses for a site and the error at these ranks; keep the bases for the split."""
    assert wish.scheme is not None
    site, scheme = wish.site, wish.scheme
    reads_values = wish.in_force.rank.reads_values
    choice = wish.choose(cache.spectra(site, scheme, weights)) if reads_values else _choose_unread(wish)
    candidate = None if choice.kept else wish.candidate(choice)
    if candidate is None:
        return choice, None
    error = cache.error(site, scheme, candidate.ranks, weights)
    cache.keep(site, scheme, candidate.ranks, cache.spectra(site, scheme, weights, candidate.ranks))
    return choice, error


def _choose_unread(wish: SiteWish) -> Choice:
    return wish.choose(unread(wish.full_ranks))


def _with_errors(
    wishes: Sequence[SiteWish], decisions: Sequence[SitePlan], cache: SpectrumCache, processes: Processes
) -> list[SitePlan]:
    missing = [
        (wish.site, Candidate.of(decision))
        for wish, decision in zip(wishes, decisions, strict=True)
        if decision.factorized and decision.error is None and has_values(wish.site)
    ]
    tasks = [Task(partial(_error, site, candidate, cache), site.weights) for site, candidate in missing]
    errors = {site.name: error for (site, _), (error,) in zip(missing, processes.map_tasks(tasks), strict=True)}
    return [replace(each, error=errors[each.name]) if each.name in errors else each for each in decisions]


def _error(site: Site, candidate: Candidate, cache: SpectrumCache, *weights: Tensor) -> tuple[float]:
    return (cache.error(site, candidate.scheme, candidate.ranks, weights),)

"""Decisions for the sites that share one budget: candidates for each site, then one choice for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from tdfx.distributed.processes import Processes, Task
from tdfx.errors import PolicyError
from tdfx.passes.planning.budget import BudgetSite, BudgetSolver
from tdfx.passes.planning.candidates import CandidateSet, candidates_of
from tdfx.passes.planning.limits import BudgetScope
from tdfx.passes.planning.proposals import SiteWish
from tdfx.passes.planning.site_cost import Candidate, keep
from tdfx.passes.planning.spectra import SpectrumCache
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.ranks.signal import NO_SIGNAL

_MISSED = "the example inputs do not reach it, so it is not known how long it takes"


def decide_by_budget(
    policy: Policy,
    wishes: Sequence[SiteWish],
    scope: BudgetScope,
    times: SiteTimes,
    cache: SpectrumCache,
    processes: Processes,
) -> tuple[list[SitePlan], tuple[str, ...]]:
    """Return the decisions for the sites of a budget, the policy's rule, in order, and notes on the whole.

    Each weight is read by one of the processes, whose cache keeps the spectra of sites that will be split.

    Raises:
        PolicyError: The budget cannot be kept, or needs something that is not known.
    """
    budget = policy.rank
    assert isinstance(budget, Budget)
    tasks = [Task(partial(_candidates, wish, cache), wish.site.weights) for wish in wishes]
    sets = {wish.site.name: each for wish, (each,) in zip(wishes, processes.map_tasks(tasks), strict=True)}
    kept = _kept(wishes, sets, budget)
    open_wishes = [wish for wish in wishes if wish.site.name not in kept]
    sites = [BudgetSite(wish.site, wish.in_force, sets[wish.site.name].errors) for wish in open_wishes]
    missed = [wish.site for wish in wishes if budget.is_of_time and wish.site.is_missed]
    if missed and not sites and budget.strict:
        raise PolicyError(
            f"{budget!r} cannot be kept: the example inputs reach none of the {len(missed)} sites that it could decide, "
            f"in train mode neither, so it is not known how long they take. Pass inputs that the model trains on, or "
            f"give a budget of parameters."
        )
    scope = scope.beside([(wish.site, kept[wish.site.name]) for wish in wishes if wish.site.name in kept])
    solver = BudgetSolver(policy, times, scope, sites, processes)
    decided = {site.site.name: decision for site, decision in zip(sites, solver.solve(), strict=True)} | kept
    for wish in wishes:
        _keep_chosen_bases(wish.site, decided[wish.site.name], cache)
    noisy = [name for name, each in sets.items() if not each.signal and decided[name].factorized]
    notes = [*solver.notes, *([_noisy(noisy, budget)] if noisy else []), *([_unreached(missed)] if missed else [])]
    return [decided[wish.site.name] for wish in wishes], tuple(notes)


def _candidates(wish: SiteWish, cache: SpectrumCache, weight: Tensor) -> tuple[CandidateSet]:
    return (candidates_of(wish.site, wish.in_force, cache, weight),)


def _kept(wishes: Sequence[SiteWish], sets: dict[str, CandidateSet], budget: Budget) -> dict[str, SitePlan]:
    """Return the sites that are kept whatever the budget: without candidates, or without a known time."""
    kept = {}
    for wish in wishes:
        candidates = sets[wish.site.name]
        if not candidates.signal and not candidates.errors:
            kept[wish.site.name] = keep(wish.site, Reason.NO_SIGNAL, NO_SIGNAL)
        if budget.is_of_time and wish.site.is_missed:
            kept[wish.site.name] = keep(wish.site, Reason.NOT_CALLED, _MISSED)
    return kept


def _keep_chosen_bases(site: Site, decision: SitePlan, cache: SpectrumCache) -> None:
    """Cut the bases of the chosen scheme to the chosen ranks, and forget all others of the site."""
    if not decision.factorized:
        cache.evict(site)
        return
    chosen = Candidate.of(decision)
    if spectra := cache.take(site, chosen.scheme):
        cache.keep(site, chosen.scheme, chosen.ranks, spectra)


def _unreached(missed: Sequence[Site]) -> str:
    return (
        f"the example inputs do not reach {_few([site.name for site in missed])}, in train mode neither: left as they are, "
        f"since it is not known how long they take. Pass inputs that the model trains on, if they matter"
    )


def _noisy(names: Sequence[str], budget: Budget) -> str:
    floor = (
        f"no rank there is below {budget.noise_floor:g} of the full one" if budget.noise_floor else "they have no floor"
    )
    return (
        f"{len(names)} of the weights that are cut show nothing above the noise yet ({_few(names)}); {floor}. Train longer "
        f"before the switch, or keep them with noise_floor=1, if the loss suffers"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")

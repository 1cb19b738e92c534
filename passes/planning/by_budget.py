"""Decisions for the sites that share one budget: candidates for each site, then one choice for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tdfx.distributed.processes import Processes, Task
from tdfx.errors import PolicyError
from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, budget_schemes
from tdfx.factors.scheme import Scheme
from tdfx.passes.planning.budget import BudgetSolver
from tdfx.passes.planning.budget_site import BudgetSite
from tdfx.passes.planning.limits import BudgetScope
from tdfx.passes.planning.proposals import SiteWish, rounded
from tdfx.passes.planning.site_cost import Candidate, keep
from tdfx.passes.planning.spectra import Spectra, SpectrumCache
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.planning.weights import rough_weight
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.ranks.signal import NO_SIGNAL, has_signal
from tdfx.ranks.spectrum import Spectrum
from tdfx.text import first_names

_MISSED = "the example inputs do not reach it, so it is not known how long it takes"
_LEVELS = 16
"""Ranks that are tried of each scheme, from ``_HIGHEST`` of the full rank down to 1."""
_HIGHEST = 0.9
"""Share of the full rank from which ranks are tried downwards."""
_LEADING = 5 / 16
"""Share of the full rank up to which the directions of a very large weight are computed; errors above are upper bounds."""
_SMALL_ERROR = 0.1
"""Squared error, relative to the weight's square, up to which ranks below the budget's floor are allowed. In the metric of
the loss no error is that small: it says what a cut costs at once, and not what the layer can learn afterwards."""
_LARGEST_SIDE = 1024
"""Longest side that is decomposed for the spatial scheme, which competes with others: more would take too long."""


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
    notes = [*solver.notes, *([_noisy(len(noisy), budget)] if noisy else []), *([_unreached(missed)] if missed else [])]
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
        f"the example inputs do not reach {first_names([site.name for site in missed])}, in train mode neither: left as "
        f"they are, since it is not known how long they take. Pass inputs that the model trains on, if they matter"
    )


def _noisy(count: int, budget: Budget) -> str:
    floor = f"={budget.noise_floor:g} bounds their ranks" if budget.noise_floor else "=1 would keep them"
    return f"{count} cut weights show only noise yet; noise_floor{floor}"


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """The candidates for one dense site."""

    errors: dict[Candidate, float]
    """The error of each candidate, relative to the weight's norm."""
    signal: bool
    """Whether the weight shows anything above the noise."""


def candidates_of(site: Site, policy: Policy, cache: SpectrumCache, weight: Tensor) -> CandidateSet:
    """Return the candidates for a dense site that the policy's budget allows; the cache keeps the bases if it has room."""
    operation, budget = site.known_operation, policy.rank
    assert isinstance(budget, Budget)
    shared: dict[str, Spectra] = {}
    errors: dict[Candidate, float] = {}
    signal: bool | None = None
    schemes = list(schemes_for(operation, policy))
    working: dict[tuple[bool, bool], Tensor] = {}
    for scheme in schemes:
        form = scheme.mixes_outputs, scheme.in_float32  # what the metric and the dtype depend on
        if form not in working:
            working[form] = rough_weight(site, scheme, weight)
        w_dense = working[form]
        # The bases of the first scheme, and of those that share them, are kept for the split; others have no room.
        full = scheme.full_ranks(operation)
        spectra = shared.get(scheme.name) or (
            scheme.values(operation, w_dense)
            if shared
            else scheme.leading_spectra(operation, w_dense, [math.ceil(_LEADING * rank) for rank in full])
        )
        if not shared or scheme.name in shared:
            cache.hold(site, scheme, spectra)
        shared |= {scheme.name: spectra, **scheme.partial_spectra(spectra)}
        signal = has_signal(spectra) if signal is None else signal
        least = budget.least_ranks(full, signal)
        is_fixed = not signal or site.metric is not None
        grid = _grid(spectra, full, policy, site, scheme, least if is_fixed else None)
        for ranks, error in zip(grid, scheme.errors(operation, w_dense, grid, spectra), strict=True):
            is_above = all(rank >= fewest for rank, fewest in zip(ranks, least, strict=True))
            if is_above or (not is_fixed and error**2 <= _SMALL_ERROR):
                errors[Candidate(scheme, ranks, policy.recompute)] = error
    return CandidateSet(errors, bool(signal))


def schemes_for(operation: Operation, policy: Policy) -> Iterator[Scheme]:
    """Yield the schemes among which a budget chooses for a site."""
    is_auto = policy.scheme == AUTO
    for scheme in budget_schemes(policy.scheme):
        if not scheme.fits(operation) or (is_auto and operation.is_depthwise and not scheme.in_auto):
            continue
        if not is_auto or scheme.name != "spatial" or max(scheme.full_ranks(operation)) <= _LARGEST_SIDE:
            yield scheme


def _grid(
    spectra: Sequence[Spectrum],
    full: Sequence[int],
    policy: Policy,
    site: Site,
    scheme: Scheme,
    least: Sequence[int] | None,
) -> list[tuple[int, ...]]:
    """Return ranks from high to low that lose about equally much in each mode, never all modes at full rank.

    With ``least`` no mode gets fewer ranks than that.
    """
    energies = [spectrum.energy().numpy() for spectrum in spectra]
    grid = []
    for level in range(_LEVELS):
        # In equal ratios, down to rank 1.
        shares = tuple(max(1, round((_HIGHEST * most) ** (1 - level / (_LEVELS - 1)))) for most in full)
        # A mode whose values fall off faster gets fewer ranks than its share, at the same loss.
        loss = max(
            1.0 - float(energy[min(rank, len(energy)) - 1]) for energy, rank in zip(energies, shares, strict=True)
        )
        even = tuple(min(int(energy.searchsorted(1.0 - loss - 1e-12)) + 1, len(energy)) for energy in energies)
        for ranks in (shares, even):
            raised = tuple(map(max, ranks, least)) if least else ranks
            grid.append(raised)
    # Most levels come to the same ranks where there is a floor.
    rounded_grid = (rounded(ranks, full, policy, site, scheme) for ranks in dict.fromkeys(grid))
    below_full = (ranks for ranks in rounded_grid if any(rank < most for rank, most in zip(ranks, full, strict=True)))
    return list(dict.fromkeys(below_full))

"""What is worth it: a site by its gain, a candidate by what it loses for the time that it saves, and a plan by its step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tdfx.passes.planning.knapsack import Item
from tdfx.passes.planning.site_cost import Candidate
from tdfx.plans.plan import Plan, Reason, SitePlan, part_of_step
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget

Place = list[tuple[Candidate | None, Item]]
"""What can be done with one site, with loss and costs; None stands for keeping it."""

_UNSURE = 0.03
"""Relative difference to the least gain within which a measured gain is as good as equal to it."""
_LEAST = 0.02
"""Relative error of any prediction of a time, at best."""
_SURE = 0.15
"""Relative error of a step's time that is no reason to be careful."""
_CARE = 0.25
"""Share of an estimated reduction in time that is left out for each busy process that shares the processor."""
_LEAST_CARE = 0.1
"""The same on any busy machine."""
_BUSY, _FEW = 1.1, 0.1
"""Load of a machine above which it is busy, and share of a reduction in time that may rest on estimates there."""
_MOST_CARE = 0.5
"""Share of a reduction in time that is left out at the most because it is not sure."""
_MEASURED, _ESTIMATED = 0.05, 0.2
"""Relative errors of what a site saves: by measured times, and by estimates in their scale."""


def gains_enough(gain: float, estimated: float, least: float) -> bool:
    """Return whether a site's gain is at least ``least``; if that is too close to tell, by the gain that arithmetic gives.

    So a site near the limit is decided alike in each run, and not by the noise of its times.

    >>> gains_enough(1.2, 1.0, 1.05), gains_enough(1.06, 1.0, 1.05), gains_enough(1.04, 1.5, 1.05)
    (True, False, True)
    >>> gains_enough(0.99, 1.5, 1.0)
    False
    """
    if gain < min(1.0, least) or not abs(gain / least - 1 if least else 1.0) < _UNSURE:
        return gain >= least
    return estimated >= least


def worthwhile(place: Place, least_rate: float) -> Place:
    """Leave out candidates that save less than ``least_rate`` seconds for each unit by which they lose more than others.

    The first of the costs is the time. Candidates are given in the order of their losses.
    """
    kept = place[:1]
    for entry in place[1:]:
        saved, lost = (kept[-1][1].costs[0] - entry[1].costs[0], entry[1].loss - kept[-1][1].loss)
        if saved >= least_rate * lost:
            kept.append(entry)
    return kept


def sure_part(estimated: float, step_doubt: float, load: float) -> float:
    """Return the part of a reduction in time to make, where a share of it is ``estimated``, on a machine under a load.

    >>> sure_part(1.0, 0.03, 1.0), sure_part(0.0, 0.03, 6.0), sure_part(1.0, 0.03, 3.0), sure_part(0.2, 0.03, 1.2)
    (1.0, 1.0, 0.5, 0.9)
    """
    of_estimates = max((load - 1) * _CARE * estimated, _LEAST_CARE) if load > _BUSY and estimated > _FEW else 0.0
    return 1 - min(_MOST_CARE, max(of_estimates, step_doubt - _SURE))


def uncertainty(plan: Plan, step_doubt: float) -> float | None:
    """Return the relative error that is to be expected of the step's predicted time; None where the step was not timed.

    Args:
        plan: The plan.
        step_doubt: The same of the step as it is now, compared with its sites.
    """
    if plan.step_seconds is None or plan.step_seconds_after is None:
        return None
    timed = [
        (site.seconds_before - site.seconds_after, _ESTIMATED if site.estimated else _MEASURED)
        for site in plan.sites
        if site.seconds_before is not None and site.seconds_after is not None
    ]
    share = part_of_step(sum(site.seconds_before or 0.0 for site in plan.sites), plan.step_seconds)
    of_sites = share * sum(abs(seconds) * error for seconds, error in timed)
    of_step = step_doubt * (plan.step_seconds - plan.step_seconds_after)
    return max(_LEAST, math.hypot(of_sites, of_step) / plan.step_seconds_after) if plan.factorized else 0.0


def is_in_vain(plan: Plan, policy: Policy) -> bool:
    """Return whether a plan by a budget that need not be kept gains too little of the whole step, sure as that is."""
    budget = policy.rank
    if not isinstance(budget, Budget) or budget.strict or not budget.is_of_time or not plan.factorized:
        return False
    return plan.speedup is not None and plan.speedup / (1 + (plan.uncertainty or 0.0)) < policy.min_gain


def without(plan: Plan, kept: Mapping[str, SitePlan], policy: Policy) -> Plan:
    """Return a plan that keeps the sites of a budget, and says why.

    Args:
        plan: The plan, which is in vain.
        kept: Name -> the decision to keep a site.
        policy: The policy.
    """
    assert plan.speedup is not None
    gain = f"the whole step would get {plan.speedup:.2f}x faster, ± {plan.uncertainty or 0.0:.0%}"
    sites = [_kept(site, kept[site.name], gain) if site.name in kept else site for site in plan.sites]
    note = f"{len(kept)} sites stay as they are: {gain}, and min_gain asks for {policy.min_gain:g}x"
    return replace(plan, sites=tuple(sites), notes=(*plan.notes, note))


def _kept(site: SitePlan, kept: SitePlan, why: str) -> SitePlan:
    return replace(
        kept,
        reason=Reason.NO_GAIN,
        note=why,
        full_ranks=site.full_ranks,
        gain=site.gain,
        seconds_before=site.seconds_before,
        seconds_after=site.seconds_before,
    )

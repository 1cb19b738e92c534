"""Sites + policy -> plan: a scheme and ranks for each site, or the reason why it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from tdfx.errors import PolicyError, nearest
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.planning.by_budget import decide_by_budget, schemes_for
from tdfx.passes.planning.by_rule import decide_by_rule
from tdfx.passes.planning.limits import BudgetScope
from tdfx.passes.planning.proposals import SiteWish
from tdfx.passes.planning.site_cost import Candidate, current_chain, is_lazy, keep
from tdfx.passes.planning.spectra import SpectrumCache
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.planning.weights import check_weight
from tdfx.passes.planning.worthwhile import is_in_vain, uncertainty, without
from tdfx.passes.program import Program
from tdfx.plans.plan import Plan, Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget


@dataclass(frozen=True, slots=True)
class Selected(PassResult):
    """A program with a plan, and the spectra that were read for it."""

    spectra: SpectrumCache = field(default_factory=SpectrumCache)


class Select(Pass[Selected]):
    """Decide for every site by the policy; measuring for the same plan has taken ``spent`` seconds already."""

    name = "select"

    def __init__(self, policy: Policy, spent: float = 0.0) -> None:
        self.policy = policy
        self.spent = spent

    def requires(self, program: Program) -> None:
        """Every pattern matches some site, and every weight that may be split is finite."""
        names = [name for site in program.sites for name in site.names]
        for policy in _policies(self.policy):
            for setting, patterns in policy.patterns().items():
                for pattern in patterns:
                    _check_pattern(setting, pattern, names)
        for site in program.sites:
            resolved = self.policy.for_site(*site.names)
            if site.is_open and resolved is not None:
                check_weight(site, resolved.rank)

    @torch.no_grad()
    def run(self, program: Program) -> Selected:
        """Decide by rules for each site, then for the sites of a budget together."""
        processes = program.processes
        wishes = [SiteWish.of(site, self.policy) for site in program.sites]
        cache = SpectrumCache(weight for wish in wishes if wish.site.is_open for weight in wish.site.weights)
        times = SiteTimes(processes, self.spent)
        budgeted = [wish for wish in wishes if _is_in_budget(wish, self.policy)]
        by_rule = [wish for wish in wishes if not _is_in_budget(wish, self.policy)]
        decided = _with_seconds(by_rule, decide_by_rule(by_rule, times, cache, processes), times)
        notes: tuple[str, ...] = ()
        other_parameters = _other_parameters(program)
        if isinstance(self.policy.rank, Budget):
            others = tuple((wish.site, decision) for wish, decision in zip(by_rule, decided, strict=True))
            scope = BudgetScope(others, other_parameters, program.step_seconds, program.step_doubt, program.load)
            solved, notes = decide_by_budget(self.policy, budgeted, scope, times, cache, processes)
            decided += _with_seconds(budgeted, solved, times)
        decisions = {decision.name: decision for decision in decided}
        plan = Plan(
            sites=tuple(decisions[site.name] for site in program.sites),
            emit=program.emit,
            notes=(*program.notes, *notes),
            model=type(program.module).__name__,
            policy=repr(self.policy),
            other_parameters=other_parameters,
            step_seconds=program.step_seconds,
        )
        plan = replace(plan, uncertainty=uncertainty(plan, program.step_doubt))
        if is_in_vain(plan, self.policy):
            cut = [wish.site for wish in budgeted if decisions[wish.site.name].factorized]
            plan = without(plan, {site.name: keep(site, Reason.NO_GAIN) for site in cut}, self.policy)
            plan = replace(plan, uncertainty=uncertainty(plan, program.step_doubt))
            for site in cut:
                cache.evict(site)
        plan = processes.broadcast_object(plan)
        changes = tuple(Change(each.name, f"{each.scheme} at {each.ranks}") for each in plan.factorized)
        return Selected(replace(program, plan=plan), changes, cache)

    def ensures(self, before: Program, result: Selected) -> None:
        """Every site has a decision, and no decision asks for what the site cannot give."""
        self.check(result.program.plan is not None, "a plan was made")
        decisions = result.program.plan or ()
        names = [site.name for site in before.sites]
        self.check([decision.name for decision in decisions] == names, "every site has a decision")
        for site, decision in zip(before.sites, decisions, strict=True):
            self.check(site.is_open or not decision.factorized, f"site {site.name!r} may not be rewritten")


def _policies(policy: Policy) -> Iterator[Policy]:
    yield policy
    for override in policy.overrides.values():
        if override is not None:
            yield from _policies(override)


def _check_pattern(setting: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        known = f"Nearest: {nearest(pattern, names)}." if names else "The model has no convolution or linear layer."
        raise PolicyError(
            f"The pattern {pattern!r} in {setting} matches none of the model's {len(names)} sites: a policy that names "
            f"what is not there was written for another model. {known} tdfx.plan lists them all."
        )


def _is_in_budget(wish: SiteWish, policy: Policy) -> bool:
    """Return True for a site that the policy's budget decides, together with the others of the budget."""
    operation, resolved = wish.site.operation, wish.policy
    if not isinstance(policy.rank, Budget) or wish.site.reason is not None or operation is None or resolved is None:
        return False
    return resolved.rank == policy.rank and any(schemes_for(operation, resolved))


def _with_seconds(wishes: Sequence[SiteWish], decisions: Sequence[SitePlan], times: SiteTimes) -> list[SitePlan]:
    return [_timed(wish, decision, times) for wish, decision in zip(wishes, decisions, strict=True)]


def _timed(wish: SiteWish, decision: SitePlan, times: SiteTimes) -> SitePlan:
    if wish.policy is None or wish.site.operation is None:
        return decision
    before = after = times.measured(wish.policy.cost, wish.site, current_chain(wish.site))
    if decision.factorized:
        after = times.measured(wish.policy.cost, wish.site, Candidate.of(decision))
    return decision if None in (before, after) else replace(decision, seconds_before=before, seconds_after=after)


def _other_parameters(program: Program) -> int:
    total = sum(parameter.numel() for parameter in program.module.parameters() if not is_lazy(parameter))
    return total - sum(keep(site, Reason.EXCLUDED).parameters_before for site in program.sites)

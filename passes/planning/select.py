"""Sites + policy -> plan: a scheme and ranks for each site, or the reason why it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch

from tdfx.cost.modelled import MeasuringCost
from tdfx.distributed.processes import Agree, Lead, Spread, Task, alone, itself
from tdfx.errors import PolicyError, nearest
from tdfx.factors.registry import AUTO, get_scheme
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.planning.budget import BudgetSite, BudgetSolver
from tdfx.passes.planning.candidates import pack_options, schemes_for, unpack_options
from tdfx.passes.planning.limits import BudgetScope
from tdfx.passes.planning.proposals import Candidate, Proposal, geometry, lowest_option, propose, scheme_of
from tdfx.passes.planning.readings import Readings
from tdfx.passes.planning.site_cost import current_chain, factor_chain, is_lazy, keep
from tdfx.passes.planning.times import SiteTimes, TimingRequest
from tdfx.passes.planning.weights import check_weight, has_values
from tdfx.passes.program import Program, Site
from tdfx.plans.plan import Plan, Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.progress import progress
from tdfx.ranks.budget import Budget
from tdfx.ranks.signal import NO_SIGNAL


class Select(Pass):
    """Decide for every site by the policy, and write the decision on the graph's nodes."""

    name = "select"

    def __init__(
        self,
        policy: Policy,
        spread: Spread = alone,
        agree: Agree = itself,
        times: SiteTimes | None = None,
    ) -> None:
        """Take the policy, how processes share work, and the times of sites."""
        self.policy = policy
        self.spread = spread
        self.agree = agree
        self.times = times or SiteTimes(Lead())
        self.readings = Readings()

    def requires(self, program: Program) -> None:
        """Every pattern matches some site, and every weight that may be split is finite."""
        names = [name for site in program.sites for name in site.names]
        for policy in _policies(self.policy):
            for setting, patterns in policy.patterns().items():
                for pattern in patterns:
                    _check_pattern(setting, pattern, names)
        for site in program.sites:
            own = self.policy.for_site(*site.names)
            if site.is_open and own is not None:
                check_weight(site, own.rank)

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Decide every site, and add the error of each site that will be factorized."""
        together = self.spread is not alone
        open_to = [(site, self.policy.for_site(*site.names)) for site in program.sites if site.is_open]
        self.readings.make_room(weight for site, _ in open_to for weight in site.weights)
        if together:
            cases = [(one, scheme_of(one, policy)) for one, policy in open_to if policy is not None and has_values(one)]
            self.readings.read_together([(site, scheme) for site, scheme in cases if scheme is not None], self.spread)
        rest = _other_parameters(program)
        decided, notes = self._decide_all(program.sites, rest, program.step_seconds)
        # From here on the processes read the same weights, in the same order.
        policy = repr(self.policy)
        if together:
            decided, notes, policy = self.agree((decided, notes, policy))
        sites = self._with_errors(program.sites, decided)
        for site, decision in zip(program.sites, sites, strict=True):
            for node in site.nodes:
                node.meta["tdfx"] = decision
        plan = Plan(
            sites=sites,
            emit=program.emit,
            notes=(*program.notes, *notes),
            model=type(program.module).__name__,
            policy=policy,
            other_parameters=rest,
            step_seconds=program.step_seconds,
        )
        changes = tuple(Change(one.name, f"{one.scheme} at {one.ranks}") for one in plan.factorized)
        return PassResult(replace(program, plan=plan), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """Every site has a decision, and no decision asks for what the site cannot give."""
        plan = result.program.plan
        self.check(plan is not None, "a plan was made")
        assert plan is not None
        self.check([one.name for one in plan] == [site.name for site in before.sites], "every site has a decision")
        for site, decision in zip(before.sites, plan, strict=True):
            self.check(site.is_open or not decision.factorized, f"site {site.name!r} may not be rewritten")

    def _decide_all(
        self, sites: Sequence[Site], rest: int, step_seconds: float | None
    ) -> tuple[tuple[SitePlan, ...], tuple[str, ...]]:
        """Decide each site that is decided by itself, then those of a budget; return notes too.

        Args:
            sites: All of them.
            rest: Parameters that belong to none.
            step_seconds: Measured time of the model's training step, if known.
        """
        budgeted = [one for one in sites if self._in_budget(one)]
        plain = [one for one in sites if not self._in_budget(one)]
        decided = self._decide_each(plain)
        if not isinstance(self.policy.rank, Budget):
            return decided, ()
        found = dict(zip((one.name for one in plain), decided, strict=True))
        solved, notes = self._solve(budgeted, list(zip(plain, decided, strict=True)), rest, step_seconds)
        found |= {one.name: one for one in solved}
        return tuple(found[one.name] for one in sites), notes

    def _in_budget(self, site: Site) -> bool:
        """Return True for a site that a budget decides, together with all others of its kind."""
        if not isinstance(self.policy.rank, Budget) or site.reason is not None or site.operation is None:
            return False
        own = self.policy.for_site(*site.names)
        return own is not None and own.rank == self.policy.rank and any(schemes_for(site.operation, own))

    def _solve(
        self, sites: Sequence[Site], others: Sequence[tuple[Site, SitePlan]], rest: int, step_seconds: float | None
    ) -> tuple[list[SitePlan], tuple[str, ...]]:
        """Decide the sites of a budget together; return notes too."""
        budget = self.policy.rank
        assert isinstance(budget, Budget)
        cases = [(site, own) for site in sites if (own := self.policy.for_site(*site.names)) is not None]
        tasks = [Task(partial(pack_options, site, own), site.weights) for site, own in cases]
        found = [unpack_options(own, *packed) for (_, own), packed in zip(cases, self.spread(tasks), strict=True)]
        for site, one in zip(sites, found, strict=True):
            self.readings.know(site, {option: lost**0.5 for option, lost in one.options})
        without = [site for site, one in zip(sites, found, strict=True) if not one.signal]
        shut = {site.name for site, one in zip(sites, found, strict=True) if not one.options}
        kept = {one.name: keep(one, Reason.NO_SIGNAL, NO_SIGNAL) for one in without if one.name in shut}
        missed = [site for site in sites if budget.is_of_time and site.is_missed]
        kept |= {one.name: keep(one, Reason.NOT_CALLED, _MISSED) for one in missed}
        candidates = [
            BudgetSite(site, own, one.options)
            for (site, own), one in zip(cases, found, strict=True)
            if site.name not in kept
        ]
        if missed and not candidates and budget.strict:
            raise PolicyError(
                f"{budget!r} cannot be kept: the example inputs reach none of the {len(missed)} sites that it could decide, "
                f"in train mode neither, so it is not known how long they take. Pass inputs that the model trains on, or "
                f"give a budget of parameters."
            )
        decided = [*others, *((site, kept[site.name]) for site in sites if site.name in kept)]
        solver = BudgetSolver(self.policy, self.times, BudgetScope(tuple(decided), rest, step_seconds), candidates)
        solved = {one.site.name: plan for one, plan in zip(candidates, solver.solve(), strict=True)}
        noisy = [one.name for one in without if one.name in solved and solved[one.name].factorized]
        notes = (*solver.notes, *([_noisy(noisy, budget)] if noisy else []), *([_unknown(missed)] if missed else []))
        return [self._with_seconds(site, (kept | solved)[site.name]) for site in sites], notes

    def _decide_each(self, sites: Sequence[Site]) -> tuple[SitePlan, ...]:
        """Decide each site by itself; the times of all of them are measured together."""
        self._measure_doubtful(sites)
        proposed = []
        with progress("reading weights", len(sites)) as advance:
            for site in sites:
                proposed.append(self._proposed(site))
                advance(1)
        self.times.prepare(
            TimingRequest(one.policy.cost, one.site, tuple(option.chain for option in one.options))
            for one in proposed
            if isinstance(one, Proposal) and one.policy.min_gain > 0
        )
        return tuple(map(self._with_seconds, sites, map(self._settled, proposed)))

    def _measure_doubtful(self, sites: Sequence[Site]) -> None:
        """Have measured how fast sites could be at the lowest ranks, where arithmetic says that this may not be enough."""
        cases = []
        for site in sites:
            policy = self.policy.for_site(*site.names) if site.reason is None else None
            scheme = scheme_of(site, policy) if policy is not None else None
            if policy is not None and scheme is not None and policy.min_gain > 0 and not policy.rank.exact:
                lowest = lowest_option(site, policy, scheme).chain
                if self.times.estimated_gain(policy.cost, site, lowest) < _DOUBT * policy.min_gain:
                    cases.append(TimingRequest(policy.cost, site, (lowest,)))
        self.times.prepare(cases)

    def _proposed(self, site: Site) -> SitePlan | Proposal:
        policy = self.policy.for_site(*site.names)
        if site.reason is not None and (policy is None or not site.is_open):
            return keep(site, site.reason, site.note)
        if policy is None:
            return keep(site, Reason.EXCLUDED)
        scheme = scheme_of(site, policy)
        assert site.operation is not None
        if site.reason is Reason.FACTORIZED and (scheme is None or isinstance(policy.rank, Budget)):
            return keep(site, site.reason, site.note)
        if scheme is None:
            asked = "no scheme stands" if policy.scheme == AUTO else f"{policy.scheme} does not stand"
            return keep(site, Reason.NO_SCHEME, f"{asked} for {geometry(site.operation)}")
        timed = isinstance(policy.cost, MeasuringCost) and policy.min_gain > 0 and bool(site.flows)
        gain = partial(self.times.gain, policy.cost)
        found = propose(site, policy, scheme, self.readings.spectra_of, gain, variants=timed)
        if not isinstance(found, Proposal):
            self.readings.drop(site, scheme)
        elif self.spread is alone and has_values(site):
            # Processes must agree on the ranks first.
            self.readings.foresee(site, found.options[0])
        return found

    def _settled(self, found: SitePlan | Proposal) -> SitePlan:
        if not isinstance(found, Proposal):
            return found
        decided = found.settled(partial(self.times.gain, found.policy.cost))
        if decided.scheme != found.options[0].scheme.name:
            # What was read is of use to the rule's own scheme alone.
            self.readings.drop(found.site, found.options[0].scheme)
        return decided

    def _with_seconds(self, site: Site, decided: SitePlan) -> SitePlan:
        """Say how long a site takes, before and after, where that was measured."""
        policy = self.policy.for_site(*site.names)
        if policy is None or site.operation is None:
            return decided
        before = after = self.times.measured(policy.cost, site, current_chain(site))
        if decided.scheme is not None and decided.ranks is not None:
            after = self.times.measured(policy.cost, site, factor_chain(get_scheme(decided.scheme), decided.ranks))
        return decided if None in (before, after) else replace(decided, seconds_before=before, seconds_after=after)

    def _with_errors(self, sites: Sequence[Site], decided: Sequence[SitePlan]) -> tuple[SitePlan, ...]:
        """Say of each site that is to be factorized what that loses."""
        known = {site.name: site for site in sites if has_values(site)}
        todo = [one for one in decided if one.factorized and one.name in known]
        cases = [(known[one.name], Candidate.of(one)) for one in todo]
        tasks = [Task(partial(self.readings.error, site, option), site.weights) for site, option in cases]
        errors = {one.name: float(error) for one, (error,) in zip(todo, self.spread(tasks), strict=True)}
        return tuple(replace(one, error=errors[one.name]) if one.name in errors else one for one in decided)


_DOUBT = 2.0
"""A site whose gain at the lowest ranks is less than this many times what is asked for may be too small to be rewritten."""
_MISSED = "the example inputs do not reach it, so it is not known how long it takes"


def _policies(policy: Policy) -> list[Policy]:
    nested = [one for one in policy.overrides.values() if one is not None]
    return [policy, *(deeper for one in nested for deeper in _policies(one))]


def _other_parameters(program: Program) -> int:
    """Count the parameters that belong to no site's weight."""
    counted = sum(parameter.numel() for parameter in program.module.parameters() if not is_lazy(parameter))
    return counted - sum(keep(site, Reason.EXCLUDED).parameters_before for site in program.sites)


def _unknown(missed: Sequence[Site]) -> str:
    """Say that a budget of time leaves sites alone of which it is not known what flows through them."""
    return (
        f"the example inputs do not reach {_few([site.name for site in missed])}, in train mode neither: left as they are, "
        f"since it is not known how long they take. Pass inputs that the model trains on, if they matter"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")


def _noisy(names: Sequence[str], budget: Budget) -> str:
    """Say that weights are cut which have learned nothing yet that could be told from noise."""
    least = (
        f"no rank there is below {budget.noise_floor:g} of the full one" if budget.noise_floor else "they have no floor"
    )
    return (
        f"{len(names)} of the weights that are cut show nothing above the noise yet ({_few(names)}); {least}. Train longer "
        f"before the switch, or keep them with noise_floor=1, if the loss suffers"
    )


def _check_pattern(setting: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        known = f"Nearest: {nearest(pattern, names)}." if names else "The model has no convolution or linear layer."
        raise PolicyError(
            f"The pattern {pattern!r} in {setting} matches none of the model's {len(names)} sites: a policy that names "
            f"what is not there was written for another model. {known} tdfx.plan lists them all."
        )

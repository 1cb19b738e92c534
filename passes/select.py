"""Sites + policy -> plan: a scheme and ranks for each site, or the reason why it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import PolicyError, nearest
from tdfx.factors.registry import AUTO, get_scheme
from tdfx.factors.scheme import Lowering, Scheme
from tdfx.layers import Factorized
from tdfx.passes.base import Agree, Change, Lead, Pass, PassResult, Program, Site, Spread, Task, alone, itself
from tdfx.passes.budget import BudgetSolver, Candidates, Whole
from tdfx.passes.estimate import chain_at, chain_now, is_lazy, kept_plan
from tdfx.passes.options import Loss, pack_options, schemes_for, unpack_options
from tdfx.passes.propose import Proposal, geometry, lowest_option, propose, scheme_of
from tdfx.passes.spectra import ROOM, KeptSpectra, Spectra
from tdfx.passes.times import Times, Wanted
from tdfx.passes.weights import check_weight, has_values, lowering_of, working_weight
from tdfx.plan import Plan, Reason, SitePlan
from tdfx.policy import Policy
from tdfx.progress import progress
from tdfx.ranks.budget import Budget
from tdfx.ranks.rule import RankRule, Total
from tdfx.ranks.spectrum import pack, unpack, working_dtype
from tdfx.shards import full


class Select(Pass):
    """Decide for every site by the policy, and write the decision on the graph's nodes."""

    name = "select"

    def __init__(
        self,
        policy: Policy,
        spread: Spread = alone,
        agree: Agree = itself,
        lead: Lead | None = None,
        losses: Mapping[str, Loss] | None = None,
    ) -> None:
        """Take the wish, how processes share work, and what a budget counts as a site's loss if not its weight's error."""
        self.policy = policy
        self.spread = spread
        self.agree = agree
        self.times = Times(lead or Lead())
        self.losses = losses or {}
        self.spectra = KeptSpectra()
        self._read: dict[str, Spectra] = {}
        self._errors: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}
        self._lowering_in_hand: tuple[str, Lowering] | None = None
        self._resolved: dict[int, Policy] = {}
        self._refused: dict[str, SitePlan] = {}

    def requires(self, program: Program) -> None:
        """Every pattern matches some site, and every weight that may be split is finite."""
        names = [name for site in program.sites for name in site.names]
        for policy in _policies(self.policy):
            for setting, patterns in policy.patterns().items():
                for pattern in patterns:
                    _check_pattern(setting, pattern, names)
        for site in program.sites:
            own = self.policy.for_site(*site.names)
            if site.reason in _OPEN and own is not None:
                check_weight(site, own.rank)

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Resolve rules that see all their sites at once, then decide site by site."""
        together = self.spread is not alone
        if together:
            self._read = self._read_together(program.sites)
        weights = [weight for site in program.sites if site.reason in _OPEN for weight in site.weights]
        self.spectra.room = ROOM * max((one.numel() * working_dtype(one).itemsize for one in weights), default=0)
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
            self.check(site.reason in _OPEN or not decision.factorized, f"site {site.name!r} may not be rewritten")

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
        decided, notes = self._decide_each(plain)
        if not isinstance(self.policy.rank, Budget):
            return decided, notes
        found = dict(zip((one.name for one in plain), decided, strict=True))
        found |= {one.name: one for one in self._solve(budgeted, decided, rest, step_seconds)}
        return tuple(found[one.name] for one in sites), notes

    def _in_budget(self, site: Site) -> bool:
        """Return True for a site that a budget decides, together with all others of its kind."""
        if not isinstance(self.policy.rank, Budget) or site.reason is not None or site.operation is None:
            return False
        own = self.policy.for_site(*site.names) is self.policy
        return own and any(True for _ in schemes_for(site.operation, self.policy))

    def _solve(
        self, sites: Sequence[Site], others: Sequence[SitePlan], rest: int, step_seconds: float | None
    ) -> list[SitePlan]:
        """Decide the sites of a budget together."""
        tasks = [Task(partial(pack_options, one, self.policy, self.losses.get(one.name)), one.weights) for one in sites]
        tables = [unpack_options(self.policy, table) for (table,) in self.spread(tasks)]
        if not self.losses:
            self._errors |= {
                (site.name, option.scheme.name, option.ranks): torch.tensor(lost**0.5, dtype=torch.float64)
                for site, table in zip(sites, tables, strict=True)
                for option, lost in table
            }
        whole = Whole(tuple(others), rest, step_seconds)
        candidates = [Candidates(site, tuple(table)) for site, table in zip(sites, tables, strict=True)]
        solved = BudgetSolver(self.policy, self.times, whole, candidates).solve()
        return [self._with_seconds(site, one) for site, one in zip(sites, solved, strict=True)]

    def _decide_each(self, sites: Sequence[Site]) -> tuple[tuple[SitePlan, ...], tuple[str, ...]]:
        """Resolve rules that see all their sites at once, then decide site by site; return the notes of the former too.

        Such a rule counts with times that are not measured. Where a measurement then keeps a site that it took for
        rewritten, it is resolved again without that site.
        """
        self._measure_doubtful(sites)
        while True:
            notes = self._resolve(sites)
            proposed = []
            with progress("reading weights", len(sites)) as advance:
                for site in sites:
                    proposed.append(self._proposed(site))
                    advance(1)
            self.times.prepare(
                Wanted(one.policy.cost, one.site, tuple(option.chain for option in one.options))
                for one in proposed
                if isinstance(one, Proposal) and one.policy.min_gain > 0
            )
            decided = [self._settled(one) for one in proposed]
            refused = {one.name: one for one in decided if one.reason in {Reason.NO_GAIN, Reason.TOO_SMALL}}
            if not self._resolved or refused.keys() <= self._refused.keys():
                return tuple(map(self._with_seconds, sites, decided)), notes
            self._refused |= refused

    def _measure_doubtful(self, sites: Sequence[Site]) -> None:
        """Have measured how fast sites could be at the lowest ranks, where arithmetic says that this may not be enough."""
        cases = []
        for site in sites:
            policy = self.policy.for_site(*site.names) if site.reason is None else None
            scheme = scheme_of(site, policy) if policy is not None else None
            if policy is not None and scheme is not None and policy.min_gain > 0 and not policy.rank.exact:
                lowest = lowest_option(site, policy, scheme).chain
                if self.times.estimated_gain(policy.cost, site, lowest) < _DOUBT * policy.min_gain:
                    cases.append(Wanted(policy.cost, site, (lowest,)))
        self.times.prepare(cases)

    def _resolve(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """Let each policy's rule see all sites that it decides; return what came of it where that is another rule."""
        notes = []
        for policy in {id(one): one for one in _policies(self.policy)}.values():
            if isinstance(policy.rank, Budget):
                continue
            own = [one for one in sites if one.reason in _OPEN and self.policy.for_site(*one.names) is policy]
            cases = [(one, scheme) for one in own if (scheme := scheme_of(one, policy)) is not None]
            if not cases:
                continue

            def after(rule: RankRule, policy: Policy = policy, cases: Sequence[Case] = tuple(cases)) -> Total:
                trial = replace(policy, rank=rule)
                return _total([self._on_trial(site, trial, scheme) for site, scheme in cases])

            rule = policy.rank.resolve(_total([kept_plan(site, Reason.NO_GAIN) for site, _ in cases]), after)
            if rule != policy.rank:
                self._resolved[id(policy)] = replace(policy, rank=rule)
                notes.append(f"{policy.rank!r} came to {rule!r}")
        return tuple(notes)

    def _on_trial(self, site: Site, policy: Policy, scheme: Scheme) -> SitePlan:
        """Return what a policy would decide, without a measurement."""
        if site.name in self._refused:
            return self._refused[site.name]
        gain = partial(self.times.estimated_gain, policy.cost)
        found = propose(site, policy, scheme, self._spectra, gain)
        return found.settled(gain) if isinstance(found, Proposal) else found

    def _proposed(self, site: Site) -> SitePlan | Proposal:
        policy = self.policy.for_site(*site.names)
        if site.reason not in _OPEN or (site.reason is not None and policy is None):
            return kept_plan(site, site.reason, site.note)
        if policy is None:
            return kept_plan(site, Reason.EXCLUDED)
        scheme = scheme_of(site, policy)
        assert site.operation is not None
        if site.reason is Reason.FACTORIZED and (scheme is None or isinstance(policy.rank, Budget)):
            return kept_plan(site, site.reason, site.note)
        if scheme is None:
            asked = "no scheme stands" if policy.scheme == AUTO else f"{policy.scheme} does not stand"
            return kept_plan(site, Reason.NO_SCHEME, f"{asked} for {geometry(site.operation)}")
        if site.name in self._refused:
            return self._refused[site.name]
        resolved = self._resolved.get(id(policy), policy)
        # A rule that aims at a total has counted on one scheme for each site.
        timed = isinstance(policy.cost, MeasuringCost) and policy.min_gain > 0 and bool(site.flows)
        variants = timed and resolved is policy
        gain = partial(self.times.gain, policy.cost)
        found = propose(site, resolved, scheme, self._spectra, gain, variants=variants)
        if not isinstance(found, Proposal):
            self.spectra.take(site, scheme)
        elif self.spread is alone and has_values(site):
            # Processes must agree on the ranks first.
            self._foresee(found)
        return found

    def _foresee(self, found: Proposal) -> None:
        """Work out what a rule's own option loses while the bases are in hand, and keep of these what its split needs."""
        site, option = found.site, found.options[0]
        (error,) = self._error(site, option.scheme, option.ranks, *map(full, site.weights))
        self._errors[site.name, option.scheme.name, option.ranks] = error
        if isinstance(site.layer, Factorized):
            self.spectra.take(site, option.scheme)  # its split begins with the factors
        else:
            self.spectra.cut(site, option.scheme, option.ranks)

    def _settled(self, found: SitePlan | Proposal) -> SitePlan:
        if not isinstance(found, Proposal):
            return found
        decided = found.settled(partial(self.times.gain, found.policy.cost))
        if decided.scheme != found.options[0].scheme.name:
            # What was read is of use to the rule's own scheme alone.
            self.spectra.take(found.site, found.options[0].scheme)
        return decided

    def _with_seconds(self, site: Site, decided: SitePlan) -> SitePlan:
        """Say how long a site takes, before and after, where that was measured."""
        policy = self.policy.for_site(*site.names)
        if policy is None or site.operation is None:
            return decided
        before = after = self.times.measured(policy.cost, site, chain_now(site))
        if decided.scheme is not None and decided.ranks is not None:
            after = self.times.measured(policy.cost, site, chain_at(get_scheme(decided.scheme), decided.ranks))
        return decided if None in (before, after) else replace(decided, seconds_before=before, seconds_after=after)

    def _with_errors(self, sites: Sequence[Site], decided: Sequence[SitePlan]) -> tuple[SitePlan, ...]:
        """Say of each site that is to be factorized what that loses."""
        known = {site.name: site for site in sites if has_values(site)}
        todo = [one for one in decided if one.factorized and one.name in known]
        tasks = [Task(partial(self._error_of, known[one.name], one), known[one.name].weights) for one in todo]
        errors = {one.name: float(error) for one, (error,) in zip(todo, self.spread(tasks), strict=True)}
        return tuple(replace(one, error=errors[one.name]) if one.name in errors else one for one in decided)

    def _error_of(self, site: Site, decision: SitePlan, *weights: Tensor) -> tuple[Tensor]:
        assert decision.scheme is not None
        assert decision.ranks is not None
        known = self._errors.get((site.name, decision.scheme, decision.ranks))
        return (
            (known,) if known is not None else self._error(site, get_scheme(decision.scheme), decision.ranks, *weights)
        )

    def _error(self, site: Site, scheme: Scheme, ranks: tuple[int, ...], *weights: Tensor) -> tuple[Tensor]:
        assert site.operation is not None
        if isinstance(site.layer, Factorized):
            lowering = self._lowering(site, site.layer, weights)
            return (torch.tensor(lowering.error(ranks), dtype=torch.float64),)
        weight = working_weight(site, *weights)
        spectra = self.spectra.bases(site, scheme)
        if spectra is None:
            spectra = self.spectra.put(site, scheme, scheme.spectra(site.operation, weight))
        return (torch.tensor(scheme.error(site.operation, weight, ranks, spectra), dtype=torch.float64),)

    def _read_together(self, sites: Sequence[Site]) -> dict[str, Spectra]:
        """Read every weight that may be split, once; of the spectra keep the values, which are small."""
        own = [(one, self.policy.for_site(*one.names)) for one in sites if one.reason in _OPEN and has_values(one)]
        cases = [(site, scheme) for site, policy in own if policy and (scheme := scheme_of(site, policy)) is not None]
        tasks = [Task(partial(_packed_spectra, site, scheme), site.weights) for site, scheme in cases]
        return {
            site.name: tuple(map(unpack, found[::2], found[1::2]))
            for (site, _), found in zip(cases, self.spread(tasks), strict=True)
        }

    def _spectra(self, site: Site, scheme: Scheme) -> Spectra:
        """Return the spectra of what a site computes with now."""
        if site.name in self._read:
            return self._read[site.name]
        known = self.spectra.values(site, scheme)
        if known is not None:
            return known
        if isinstance(site.layer, Factorized):
            return self.spectra.put(site, scheme, self._lowering(site, site.layer).spectra)
        assert site.operation is not None
        return self.spectra.put(site, scheme, scheme.spectra(site.operation, working_weight(site)))

    def _lowering(self, site: Site, layer: Factorized, weights: Sequence[Tensor] | None = None) -> Lowering:
        """Return how a layer's factors can be split anew, worked out once while it is looked at."""
        if self._lowering_in_hand is None or self._lowering_in_hand[0] != site.name:
            self._lowering_in_hand = None  # two at once would be too many
            self._lowering_in_hand = site.name, lowering_of(layer, weights)
        return self._lowering_in_hand[1]


_DOUBT = 2.0
"""A site whose gain at the lowest ranks is less than this many times what is asked for may be too small to be rewritten."""
_OPEN = (None, Reason.FACTORIZED)
"""What a site may say of itself for a policy to decide on it: nothing, or that its ranks could be lowered."""


def _packed_spectra(site: Site, scheme: Scheme, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return two tensors for each spectrum of what a site computes with: the values, and what else is to be known."""
    assert site.operation is not None
    if isinstance(site.layer, Factorized):
        spectra = lowering_of(site.layer, weights).spectra
    else:
        spectra = scheme.spectra(site.operation, working_weight(site, *weights))
    return tuple(part for one in spectra for part in pack(one))


Case = tuple[Site, Scheme]
"""A site that may be rewritten, and the scheme that fits it."""


def _policies(policy: Policy) -> list[Policy]:
    nested = [one for one in policy.overrides.values() if one is not None]
    return [policy, *(deeper for one in nested for deeper in _policies(one))]


def _other_parameters(program: Program) -> int:
    """Count the parameters that belong to no site's weight."""
    counted = sum(parameter.numel() for parameter in program.module.parameters() if not is_lazy(parameter))
    return counted - sum(kept_plan(site, Reason.EXCLUDED).parameters_before for site in program.sites)


def _total(plans: Sequence[SitePlan]) -> Total:
    work = [one.flops_after for one in plans]
    known = [count for count in work if count is not None]
    return Total(sum(one.parameters_after for one in plans), sum(known) if len(known) == len(work) else None)


def _check_pattern(setting: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        known = f"Nearest: {nearest(pattern, names)}." if names else "The model has no convolution or linear layer."
        raise PolicyError(
            f"The pattern {pattern!r} in {setting} matches none of the model's {len(names)} sites: a policy that names "
            f"what is not there was written for another model. {known} tdfx.plan lists them all."
        )

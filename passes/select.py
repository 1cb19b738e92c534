"""Sites + policy -> plan: a scheme and ranks for each site, or the reason why it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from tdfx.cost.count import parameters
from tdfx.errors import PolicyError, nearest
from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, get_scheme, scheme_for
from tdfx.factors.scheme import Lowering, Scheme
from tdfx.layers import Factorized
from tdfx.passes.base import Agree, Change, Pass, PassResult, Program, Site, Spread, Task, alone, itself
from tdfx.passes.estimate import chain_at, flops_of, gain_of, is_lazy, kept_plan
from tdfx.passes.spectra import ROOM, KeptSpectra, Spectra, unread
from tdfx.passes.weights import check_weight, lowering_of, working_weight
from tdfx.plan import Plan, Reason, SitePlan
from tdfx.policy import Policy
from tdfx.ranks.multiple import device_multiple, round_gently
from tdfx.ranks.rule import Choice, RankRule, Total, round_ranks
from tdfx.ranks.spectrum import pack, unpack, working_dtype
from tdfx.shards import full


class Select(Pass):
    """Decide for every site by the policy, and write the decision on the graph's nodes."""

    name = "select"

    def __init__(self, policy: Policy, spread: Spread = alone, agree: Agree = itself) -> None:
        self.policy = policy
        self.spread = spread
        self.agree = agree
        self.spectra = KeptSpectra()
        self._read: dict[str, Spectra] = {}
        self._errors: dict[tuple[str, str, tuple[int, ...]], Tensor] = {}
        self._lowering_in_hand: tuple[str, Lowering] | None = None
        self._resolved: dict[int, Policy] = {}

    def requires(self, program: Program) -> None:
        """Every pattern matches some site, and every weight that may be split is finite."""
        names = [name for site in program.sites for name in site.names]
        for policy in _policies(self.policy):
            for setting, patterns in policy.patterns().items():
                for pattern in patterns:
                    _check_pattern(setting, pattern, names)
        for site in program.sites:
            if site.reason in _OPEN and self.policy.for_site(*site.names) is not None:
                check_weight(site)

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Resolve rules that see all their sites at once, then decide site by site."""
        together = self.spread is not alone
        if together:
            self._read = self._read_together(program.sites)
        weights = [weight for site in program.sites if site.reason in _OPEN for weight in site.weights]
        self.spectra.room = ROOM * max((one.numel() * working_dtype(one).itemsize for one in weights), default=0)
        notes = self._resolve(program.sites)
        decided = tuple(self._decide(site) for site in program.sites)
        # From here on the processes read the same weights, in the same order.
        policy = repr(self.policy)
        if together:
            decided, notes, policy = self.agree((decided, notes, policy))
        sites = self._with_errors(program.sites, decided)
        for site, decision in zip(program.sites, sites, strict=True):
            for node in site.nodes:
                node.meta["tdfx"] = decision
        counted = sum(parameter.numel() for parameter in program.module.parameters() if not is_lazy(parameter))
        plan = Plan(
            sites=sites,
            emit=program.emit,
            notes=(*program.notes, *notes),
            model=type(program.module).__name__,
            policy=policy,
            other_parameters=counted - sum(one.parameters_before for one in sites),
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

    def _resolve(self, sites: Sequence[Site]) -> tuple[str, ...]:
        """Let each policy's rule see all sites that it decides; return what came of it where that is another rule."""
        notes = []
        for policy in {id(one): one for one in _policies(self.policy)}.values():
            own = [one for one in sites if one.reason in _OPEN and self.policy.for_site(*one.names) is policy]
            cases = [(one, scheme) for one in own if (scheme := _scheme(one, policy)) is not None]
            if not cases:
                continue

            def after(rule: RankRule, policy: Policy = policy, cases: Sequence[Case] = tuple(cases)) -> Total:
                trial = replace(policy, rank=rule)
                return _total([self._rank_or_lower(site, trial, scheme) for site, scheme in cases])

            rule = policy.rank.resolve(_total([kept_plan(site, Reason.NO_GAIN) for site, _ in cases]), after)
            if rule != policy.rank:
                self._resolved[id(policy)] = replace(policy, rank=rule)
                notes.append(f"{policy.rank!r} came to {rule!r}")
        return tuple(notes)

    def _decide(self, site: Site) -> SitePlan:
        policy = self.policy.for_site(*site.names)
        if site.reason not in _OPEN or (site.reason is not None and policy is None):
            return kept_plan(site, site.reason, site.note)
        if policy is None:
            return kept_plan(site, Reason.EXCLUDED)
        scheme = _scheme(site, policy)
        assert site.operation is not None
        if site.reason is Reason.FACTORIZED and scheme is None:
            return kept_plan(site, site.reason, site.note)
        if scheme is None:
            asked = "no scheme stands" if policy.scheme == AUTO else f"{policy.scheme} does not stand"
            return kept_plan(site, Reason.NO_SCHEME, f"{asked} for {_geometry(site.operation)}")
        decided = self._rank_or_lower(site, self._resolved.get(id(policy), policy), scheme)
        if decided.ranks is None:
            self.spectra.take(site, scheme)
        elif self.spread is alone:
            # Processes must agree on the ranks first.
            self._settle(site, scheme, decided)
        return decided

    def _settle(self, site: Site, scheme: Scheme, decided: SitePlan) -> None:
        """Work out what a split loses while the site's bases are in hand, and keep of these what the split will need."""
        assert decided.ranks is not None
        (error,) = self._error(site, decided, *map(full, site.weights))
        self._errors[site.name, scheme.name, decided.ranks] = error
        if isinstance(site.layer, Factorized):
            self.spectra.take(site, scheme)  # its split begins with the factors
        else:
            self.spectra.cut(site, scheme, decided.ranks)

    def _with_errors(self, sites: Sequence[Site], decided: Sequence[SitePlan]) -> tuple[SitePlan, ...]:
        """Say of each site that is to be factorized what that loses."""
        known = {site.name: site for site in sites}
        todo = [one for one in decided if one.factorized]
        tasks = [Task(partial(self._error, known[one.name], one), known[one.name].weights) for one in todo]
        errors = {one.name: float(error) for one, (error,) in zip(todo, self.spread(tasks), strict=True)}
        return tuple(replace(one, error=errors[one.name]) if one.factorized else one for one in decided)

    def _error(self, site: Site, decision: SitePlan, *weights: Tensor) -> tuple[Tensor]:
        assert decision.scheme is not None
        assert decision.ranks is not None
        assert site.operation is not None
        known = self._errors.get((site.name, decision.scheme, decision.ranks))
        if known is not None:
            return (known,)
        if isinstance(site.layer, Factorized):
            lowering = self._lowering(site, site.layer, weights)
            return (torch.tensor(lowering.error(decision.ranks), dtype=torch.float64),)
        scheme = get_scheme(decision.scheme)
        weight = working_weight(site, *weights)
        spectra = self.spectra.bases(site, scheme)
        if spectra is None:
            spectra = self.spectra.put(site, scheme, scheme.spectra(site.operation, weight))
        return (torch.tensor(scheme.error(site.operation, weight, decision.ranks, spectra), dtype=torch.float64),)

    def _read_together(self, sites: Sequence[Site]) -> dict[str, Spectra]:
        """Read every weight that may be split, once; of the spectra keep the values, which are small."""
        own = [(site, self.policy.for_site(*site.names)) for site in sites if site.reason in _OPEN]
        cases = [(site, scheme) for site, policy in own if policy and (scheme := _scheme(site, policy)) is not None]
        tasks = [Task(partial(_packed_spectra, site, scheme), site.weights) for site, scheme in cases]
        return {
            site.name: tuple(map(unpack, found[::2], found[1::2]))
            for (site, _), found in zip(cases, self.spread(tasks), strict=True)
        }

    def _choice(self, site: Site, rule: RankRule, scheme: Scheme) -> Choice:
        """Return what a rule chooses, and decompose nothing for one that does not look."""
        assert site.operation is not None
        spectra = self._spectra(site, scheme) if rule.reads_values else unread(scheme, site.operation)
        return rule.choose(_name_for(rule, site), spectra)

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

    def _rank_or_lower(self, site: Site, policy: Policy, scheme: Scheme) -> SitePlan:
        """Return the decision for a site that a scheme fits, but for its error."""
        return (self._lower if isinstance(site.layer, Factorized) else self._rank)(site, policy, scheme)

    def _rank(self, site: Site, policy: Policy, scheme: Scheme) -> SitePlan:
        operation = site.operation
        assert operation is not None
        full = scheme.full_ranks(operation)
        lowest = (1,) * len(full) if policy.rank.exact else _rounded([1] * len(full), full, policy, site, scheme)
        most = gain_of(policy, site, chain_at(scheme, lowest))
        too_small = replace(kept_plan(site, Reason.TOO_SMALL, _why_no_gain(lowest, "", policy), full), gain=most)
        if most < policy.min_gain and not policy.rank.exact:
            return too_small
        choice = self._choice(site, policy.rank, scheme)
        if choice.kept and not choice.signal and most < policy.min_gain:
            return too_small
        if choice.kept:
            return kept_plan(
                site, Reason.EXCLUDED if choice.signal else Reason.NO_SIGNAL, choice.note or choice.kept, full
            )
        ranks = choice.ranks if choice.exact else _rounded(choice.ranks, choice.limits or full, policy, site, scheme)
        gain = gain_of(policy, site, chain_at(scheme, ranks))
        if gain < policy.min_gain:
            return replace(kept_plan(site, Reason.NO_GAIN, _why_no_gain(ranks, choice.note, policy), full), gain=gain)
        return replace(
            kept_plan(site, Reason.NO_GAIN, choice.note, full),
            scheme=scheme.name,
            ranks=ranks,
            reason=None,
            parameters_after=parameters(scheme.chain(operation, ranks)),
            flops_after=flops_of(site, chain_at(scheme, ranks)),
            gain=gain,
        )

    def _lower(self, site: Site, policy: Policy, scheme: Scheme) -> SitePlan:
        """Decide on lower ranks for a site that is factorized, from its factors as they are now."""
        assert isinstance(site.layer, Factorized)
        assert site.operation is not None
        kept = kept_plan(site, Reason.FACTORIZED, site.note)
        if not site.layer.weights[0].requires_grad:
            return kept
        now, full = site.layer.origin.ranks, scheme.full_ranks(site.operation)
        choice = self._choice(site, policy.rank, scheme)
        if choice.kept:
            return kept
        wanted = choice.ranks if choice.exact else _rounded(choice.ranks, choice.limits or full, policy, site, scheme)
        ranks = tuple(map(min, wanted, now))
        gain = gain_of(policy, site, chain_at(scheme, ranks))
        if ranks == now or gain < policy.min_gain:
            return kept
        return replace(
            kept,
            scheme=scheme.name,
            ranks=ranks,
            full_ranks=full,
            reason=None,
            note=f"{site.note} before",
            parameters_after=parameters(scheme.chain(site.operation, ranks)),
            flops_after=flops_of(site, chain_at(scheme, ranks)),
            gain=gain,
        )

    def _lowering(self, site: Site, layer: Factorized, weights: Sequence[Tensor] | None = None) -> Lowering:
        """Return how a layer's factors can be split anew, worked out once while it is looked at."""
        if self._lowering_in_hand is None or self._lowering_in_hand[0] != site.name:
            self._lowering_in_hand = None  # two at once would be too many
            self._lowering_in_hand = site.name, lowering_of(layer, weights)
        return self._lowering_in_hand[1]


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


def _scheme(site: Site, policy: Policy) -> Scheme | None:
    """Return the scheme that a policy means for a site; one that is factorized can have no other than its own."""
    if isinstance(site.layer, Factorized):
        own = site.layer.scheme
        return own if policy.scheme == AUTO or get_scheme(policy.scheme).name == own.name else None
    return None if site.operation is None else scheme_for(site.operation, policy.scheme)


def _rounded(
    ranks: Sequence[int], limits: Sequence[int], policy: Policy, site: Site, scheme: Scheme
) -> tuple[int, ...]:
    """Round so that the channels between the factors, of which a rank may stand for many, are what was asked for."""
    assert site.operation is not None
    if isinstance(policy.round_to, int):
        each = math.gcd(policy.round_to, scheme.channels_per_rank(site.operation))
        return round_ranks(ranks, limits, policy.round_to // each)
    weight = site.weights[0]
    return round_gently(ranks, limits, device_multiple(weight.dtype, weight.device))


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


def _why_no_gain(ranks: tuple[int, ...], note: str, policy: Policy) -> str:
    chosen = f"at ranks {'/'.join(map(str, ranks))}; {policy.min_gain:g}x was asked"
    return f"{chosen}; {note}" if note else chosen


def _name_for(rule: RankRule, site: Site) -> str:
    """Return the name of a site by which a rule speaks of it."""
    spoken = (name for pattern in rule.patterns() for name in site.names if fnmatchcase(name, pattern))
    return next(spoken, site.name)


def _geometry(operation: Operation) -> str:
    kernel = "×".join(map(str, operation.kernel))
    shape = f"a {kernel} kernel" if operation.dims else "a linear map"
    return f"{shape} in {operation.groups} groups" if operation.groups > 1 else shape

"""What a policy wants of one site, and the decision once the times of the candidates are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self

from tdfx.cost.count import parameters
from tdfx.cost.modelled import Cost, MeasuringCost
from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, get_scheme, scheme_for
from tdfx.factors.scheme import Scheme
from tdfx.layers.factorized import Factorized
from tdfx.passes.planning.site_cost import Chain, factor_chain, flops_of, keep, memory_of
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.ranks.multiple import device_multiple, round_gently
from tdfx.ranks.rule import Choice, RankRule, round_ranks
from tdfx.ranks.spectrum import Spectrum

Gain = Callable[[Site, Chain], float]
"""From a site and a way to compute it to how many times faster that is than now."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to factorize a site."""

    scheme: Scheme
    ranks: tuple[int, ...]

    @classmethod
    def named(cls, scheme: str, ranks: tuple[int, ...]) -> Self:
        """Return the candidate of a scheme given by name."""
        return cls(get_scheme(scheme), ranks)

    @classmethod
    def of(cls, decision: SitePlan) -> Self:
        """Return the candidate that a decision has chosen."""
        assert decision.scheme is not None
        assert decision.ranks is not None
        return cls.named(decision.scheme, decision.ranks)

    @property
    def chain(self) -> Chain:
        """How the site would be computed."""
        return factor_chain(self.scheme, self.ranks)

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes by the scheme's name."""
        return Candidate.named, (self.scheme.name, self.ranks)


@dataclass(frozen=True, slots=True)
class SiteWish:
    """A site and what the policy wants of it, resolved once."""

    site: Site
    policy: Policy | None
    """The policy in force for the site, overrides looked up; None for a site that the policy excludes."""
    scheme: Scheme | None
    """The scheme that the policy means for the site; None where none fits."""

    @classmethod
    def of(cls, site: Site, policy: Policy) -> Self:
        """Resolve a policy for one site."""
        resolved = policy.for_site(*site.names)
        return cls(site, resolved, None if resolved is None else _scheme_of(site, resolved))

    @property
    def is_timed(self) -> bool:
        """True where measured times decide whether the site is rewritten."""
        return self.policy is not None and isinstance(self.cost, MeasuringCost) and self.min_gain > 0

    @property
    def rule(self) -> RankRule:
        """The rank rule in force."""
        return self._in_force.rank

    @property
    def cost(self) -> Cost:
        """What says how long the site takes."""
        return self._in_force.cost

    @property
    def min_gain(self) -> float:
        """How many times faster the site must get."""
        return self._in_force.min_gain

    def lowest(self) -> Candidate:
        """Return the scheme at the lowest ranks that the policy can come to."""
        scheme, full = self._scheme_and_full_ranks()
        ones = (1,) * len(full)
        return Candidate(scheme, ones if self.rule.exact else rounded(ones, full, self._in_force, self.site, scheme))

    def choose(self, spectra: Sequence[Spectrum]) -> Choice:
        """Return the ranks that the policy's rule reads from the spectra."""
        return self.rule.choose(self._name_for_rule(), spectra)

    def candidate(self, choice: Choice) -> Candidate | None:
        """Return the ranks of a choice, rounded; None where a factorized site would get no lower ranks."""
        scheme, full = self._scheme_and_full_ranks()
        ranks = choice.ranks
        if not choice.exact:
            ranks = rounded(ranks, choice.limits or full, self._in_force, self.site, scheme)
        if isinstance(self.site.layer, Factorized):
            current = self.site.layer.origin.ranks
            ranks = tuple(map(min, ranks, current))
            return None if ranks == current else Candidate(scheme, ranks)
        return Candidate(scheme, ranks)

    def _name_for_rule(self) -> str:
        """Return the name of the site that a pattern of the rule matches, or the site's first name."""
        patterns, names = self.rule.patterns(), self.site.names
        return next((name for pattern in patterns for name in names if fnmatchcase(name, pattern)), self.site.name)

    def _scheme_and_full_ranks(self) -> tuple[Scheme, tuple[int, ...]]:
        assert self.scheme is not None
        assert self.site.operation is not None
        return self.scheme, self.scheme.full_ranks(self.site.operation)

    @property
    def _in_force(self) -> Policy:
        assert self.policy is not None
        return self.policy


@dataclass(frozen=True, slots=True)
class Proposal:
    """The candidates for a site among which times decide."""

    wish: SiteWish
    kept: SitePlan
    """The decision if no candidate pays, but for its note."""
    candidates: tuple[Candidate, ...]
    """The rule's own first, then schemes that cut less at the same ranks."""
    note: str = ""
    """What else there is to know of the ranks."""
    error: float | None = None
    """Error of the first candidate; None where the weight has no values."""

    def settle(self, gain: Gain) -> SitePlan:
        """Return the decision: the candidate that gains most, unless not even that gains enough."""
        site, policy = self.wish.site, self.wish.policy
        assert policy is not None
        gains = {candidate: gain(site, candidate.chain) for candidate in self.candidates}
        best = max(gains, key=lambda candidate: gains[candidate])
        if gains[best] < policy.min_gain:
            if self.kept.reason is Reason.FACTORIZED:
                return self.kept
            return replace(self.kept, note=why_no_gain(best.ranks, self.note, policy), gain=gains[best])
        decision = factorize(self.kept, site, best, self.note, gains[best])
        return replace(decision, error=self.error) if best == self.candidates[0] else decision


def propose(wish: SiteWish, choice: Choice, error: float | None, gain: Gain) -> SitePlan | Proposal:
    """Return the candidates for a site whose rule has chosen ranks, or the decision to keep the site."""
    site, policy, scheme = wish.site, wish.policy, wish.scheme
    assert site.operation is not None
    assert policy is not None
    assert scheme is not None
    candidate = None if choice.kept else wish.candidate(choice)
    if isinstance(site.layer, Factorized):
        kept = keep(site, Reason.FACTORIZED, site.note)
        return kept if candidate is None else Proposal(wish, kept, (candidate,), f"{site.note} before", error)
    full = scheme.full_ranks(site.operation)
    if candidate is None:
        if not choice.signal and (gained := gain(site, wish.lowest().chain)) < policy.min_gain:
            return replace(too_small(wish, full), gain=gained)
        return keep(site, Reason.EXCLUDED if choice.signal else Reason.NO_SIGNAL, choice.note or choice.kept, full)
    candidates = [candidate]
    if wish.is_timed and site.flows and policy.scheme == AUTO and not choice.exact:
        candidates += (Candidate.named(name, ranks) for name, ranks in scheme.partial(candidate.ranks))
    return Proposal(wish, keep(site, Reason.NO_GAIN, "", full), tuple(candidates), choice.note, error)


def keep_unread(wish: SiteWish, gain: Gain) -> SitePlan | None:
    """Return the decision to keep a site if that does not depend on the weight; else None."""
    site, policy, scheme = wish.site, wish.policy, wish.scheme
    if site.reason is not None and (policy is None or not site.is_open):
        return keep(site, site.reason, site.note)
    if policy is None:
        return keep(site, Reason.EXCLUDED)
    assert site.operation is not None
    if isinstance(site.layer, Factorized):
        lowers = scheme is not None and not isinstance(policy.rank, Budget) and site.layer.trains
        return None if lowers else keep(site, Reason.FACTORIZED, site.note)
    if scheme is None:
        asked = "no scheme stands" if policy.scheme == AUTO else f"{policy.scheme} does not stand"
        return keep(site, Reason.NO_SCHEME, f"{asked} for {geometry(site.operation)}")
    gained = gain(site, wish.lowest().chain)
    if gained < policy.min_gain and not policy.rank.exact:
        return replace(too_small(wish, scheme.full_ranks(site.operation)), gain=gained)
    return None


def too_small(wish: SiteWish, full: tuple[int, ...]) -> SitePlan:
    """Return the decision to keep a site that gains too little even at the lowest ranks."""
    assert wish.policy is not None
    return keep(wish.site, Reason.TOO_SMALL, why_no_gain(wish.lowest().ranks, "", wish.policy), full)


def factorize(kept: SitePlan, site: Site, candidate: Candidate, note: str, gain: float) -> SitePlan:
    """Return the decision to factorize a site, made from the decision to keep it."""
    assert site.operation is not None
    return replace(
        kept,
        scheme=candidate.scheme.name,
        ranks=candidate.ranks,
        full_ranks=candidate.scheme.full_ranks(site.operation),
        reason=None,
        note=note,
        parameters_after=parameters(candidate.scheme.chain(site.operation, candidate.ranks)),
        flops_after=flops_of(site, candidate.chain),
        memory_after=memory_of(site, candidate.chain),
        gain=gain,
    )


def rounded(ranks: Sequence[int], limits: Sequence[int], policy: Policy, site: Site, scheme: Scheme) -> tuple[int, ...]:
    """Round ranks so that the channels between the factors, several for each rank in groups, are a wanted multiple."""
    assert site.operation is not None
    if isinstance(policy.round_to, int):
        each = math.gcd(policy.round_to, scheme.channels_per_rank(site.operation))
        return round_ranks(ranks, limits, policy.round_to // each)
    weight = site.weights[0]
    return round_gently(ranks, limits, device_multiple(weight.dtype, weight.device))


def why_no_gain(ranks: tuple[int, ...], note: str, policy: Policy) -> str:
    """Say at which ranks a rewrite would not pay."""
    chosen = f"at ranks {'/'.join(map(str, ranks))}; {policy.min_gain:g}x was asked"
    return f"{chosen}; {note}" if note else chosen


def geometry(operation: Operation) -> str:
    """Describe an operation in a few words."""
    kernel = "×".join(map(str, operation.kernel))
    shape = f"a {kernel} kernel" if operation.dims else "a linear map"
    return f"{shape} in {operation.groups} groups" if operation.groups > 1 else shape


def _scheme_of(site: Site, policy: Policy) -> Scheme | None:
    """Return the scheme that a policy means for a site; a factorized site can have no other than its own."""
    if isinstance(site.layer, Factorized):
        current = site.layer.scheme
        return current if policy.scheme == AUTO or get_scheme(policy.scheme).name == current.name else None
    return None if site.operation is None else scheme_for(site.operation, policy.scheme)

"""What a policy wants of one site, and the decision once the times of the candidates are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self

from tdfx.cost.count import parameters
from tdfx.cost.modelled import MeasuringCost
from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, get_scheme, scheme_for
from tdfx.factors.scheme import Scheme
from tdfx.layers.factorized import Factorized
from tdfx.passes.planning.site_cost import Candidate, Chain, activations_of, flops_of, keep, memory_of
from tdfx.passes.planning.worthwhile import gains_enough
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.ranks.multiple import device_multiple, round_gently
from tdfx.ranks.rule import Choice, check_choice, round_ranks
from tdfx.ranks.spectrum import Spectrum

Gain = Callable[[Site, Chain], float]
"""From a site and a way to compute it to how many times faster that is than now."""


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
        return self.policy is not None and isinstance(self.policy.cost, MeasuringCost) and self.policy.min_gain > 0

    @property
    def in_force(self) -> Policy:
        """The policy of a site that the policy does not exclude."""
        assert self.policy is not None
        return self.policy

    @property
    def full_ranks(self) -> tuple[int, ...]:
        """The ranks of the scheme at which nothing would be lost."""
        assert self.scheme is not None
        return self.scheme.full_ranks(self.site.known_operation)

    def lowest(self) -> Candidate:
        """Return the scheme at the lowest ranks that the policy can come to."""
        assert self.scheme is not None
        ones = (1,) * len(self.full_ranks)
        if not self.in_force.rank.exact:
            ones = rounded(ones, self.full_ranks, self.in_force, self.site, self.scheme)
        return Candidate(self.scheme, ones, self.in_force.recompute)

    def choose(self, spectra: Sequence[Spectrum]) -> Choice:
        """Return the ranks that the policy's rule reads from the spectra."""
        rule, names = self.in_force.rank, self.site.names
        matching = (name for pattern in rule.patterns() for name in names if fnmatchcase(name, pattern))
        return check_choice(rule, rule.choose(next(matching, self.site.name), spectra), spectra)

    def candidate(self, choice: Choice) -> Candidate | None:
        """Return the ranks of a choice, rounded; None where a factorized site would get no lower ranks."""
        assert self.scheme is not None
        ranks = choice.ranks
        if not choice.exact:
            ranks = rounded(ranks, choice.limits or self.full_ranks, self.in_force, self.site, self.scheme)
        if isinstance(self.site.layer, Factorized):
            current = self.site.layer.origin.ranks
            ranks = tuple(map(min, ranks, current))
            if ranks == current:
                return None
        return Candidate(self.scheme, ranks, self.in_force.recompute)


@dataclass(frozen=True, slots=True)
class Proposal:
    """The candidates for a site among which times decide."""

    wish: SiteWish
    kept: SitePlan
    """The decision if no candidate pays, but for its note."""
    candidates: tuple[Candidate, ...]
    """The rule's own first, then schemes that cut less at the same ranks."""
    note: str = ""
    error: float | None = None
    """Error of the first candidate; None where the weight has no values."""

    def settle(self, gain: Gain, estimated_gain: Gain) -> SitePlan:
        """Return the decision: the candidate that gains most, unless not even that gains enough."""
        site, policy = self.wish.site, self.wish.in_force
        gains = {candidate: gain(site, candidate) for candidate in self.candidates}
        best = max(gains, key=gains.__getitem__)
        if not gains_enough(gains[best], estimated_gain(site, best), policy.min_gain):
            if self.kept.reason is Reason.FACTORIZED:
                return self.kept
            return replace(self.kept, note=_why_no_gain(best.ranks, self.note, policy), gain=gains[best])
        decision = factorize(self.kept, site, best, self.note, gains[best])
        return replace(decision, error=self.error) if best == self.candidates[0] else decision


def propose(wish: SiteWish, choice: Choice, error: float | None, gain: Gain) -> SitePlan | Proposal:
    """Return the candidates for a site whose rule has chosen ranks, or the decision to keep the site."""
    site, policy = wish.site, wish.in_force
    candidate = None if choice.kept else wish.candidate(choice)
    if isinstance(site.layer, Factorized):
        kept = keep(site, Reason.FACTORIZED, site.note)
        return kept if candidate is None else Proposal(wish, kept, (candidate,), f"{site.note} before", error)
    full = wish.full_ranks
    if candidate is None:
        if not choice.signal and (gained := gain(site, wish.lowest())) < policy.min_gain:
            return _too_small(wish, gained)
        return keep(site, Reason.EXCLUDED if choice.signal else Reason.NO_SIGNAL, choice.note or choice.kept, full)
    candidates = [candidate]
    if wish.is_timed and site.flows and policy.scheme == AUTO and not choice.exact:
        partial = candidate.scheme.partial(candidate.ranks)
        candidates += (Candidate.named(name, ranks, candidate.recompute) for name, ranks in partial)
    return Proposal(wish, keep(site, Reason.NO_GAIN, "", full), tuple(candidates), choice.note, error)


def keep_unread(wish: SiteWish, gain: Gain) -> SitePlan | None:
    """Return the decision to keep a site if that does not depend on the weight; else None."""
    site, policy, scheme = wish.site, wish.policy, wish.scheme
    if site.reason is not None and (policy is None or not site.is_open):
        return keep(site, site.reason, site.note)
    if policy is None:
        return keep(site, Reason.EXCLUDED)
    if isinstance(site.layer, Factorized):
        lowers = scheme is not None and not isinstance(policy.rank, Budget) and site.layer.trains
        return None if lowers else keep(site, Reason.FACTORIZED, site.note)
    if scheme is None:
        asked = "no scheme stands" if policy.scheme == AUTO else f"{policy.scheme} does not stand"
        return keep(site, Reason.NO_SCHEME, f"{asked} for {_geometry(site.known_operation)}")
    gained = gain(site, wish.lowest())
    if gained < policy.min_gain and not policy.rank.exact:
        return _too_small(wish, gained)
    return None


def _too_small(wish: SiteWish, gain: float) -> SitePlan:
    """Return the decision to keep a site that gains too little even at the lowest ranks."""
    note = _why_no_gain(wish.lowest().ranks, "", wish.in_force)
    return replace(keep(wish.site, Reason.TOO_SMALL, note, wish.full_ranks), gain=gain)


def factorize(kept: SitePlan, site: Site, candidate: Candidate, note: str, gain: float) -> SitePlan:
    """Return the decision to factorize a site, made from the decision to keep it."""
    return replace(
        kept,
        scheme=candidate.scheme.name,
        ranks=candidate.ranks,
        recompute=candidate.recompute,
        full_ranks=candidate.scheme.full_ranks(site.known_operation),
        reason=None,
        note=note,
        parameters_after=parameters(candidate(site.known_operation)),
        flops_after=flops_of(site, candidate),
        memory_after=memory_of(site, candidate),
        activations_after=activations_of(site, candidate),
        gain=gain,
        metric="weights" if site.metric is None else site.metric.name,
    )


def rounded(ranks: Sequence[int], limits: Sequence[int], policy: Policy, site: Site, scheme: Scheme) -> tuple[int, ...]:
    """Round ranks so that the channels between the factors, several for each rank in groups, are a wanted multiple."""
    if isinstance(policy.round_to, int):
        each = math.gcd(policy.round_to, scheme.channels_per_rank(site.known_operation))
        return round_ranks(ranks, limits, policy.round_to // each)
    weight = site.weights[0]
    autocast = policy.cost.autocast if isinstance(policy.cost, MeasuringCost) else None
    dtype = autocast or (site.flows[0].setting.computes_in if site.flows else weight.dtype)
    return round_gently(ranks, limits, device_multiple(dtype, weight.device))


def _why_no_gain(ranks: tuple[int, ...], note: str, policy: Policy) -> str:
    chosen = f"at ranks {'/'.join(map(str, ranks))}; {policy.min_gain:g}x was asked"
    return f"{chosen}; {note}" if note else chosen


def _geometry(operation: Operation) -> str:
    kernel = "×".join(map(str, operation.kernel))
    shape = f"a {kernel} kernel" if operation.dims else "a linear map"
    return f"{shape} in {operation.groups} groups" if operation.groups > 1 else shape


def _scheme_of(site: Site, policy: Policy) -> Scheme | None:
    """Return the scheme that a policy means for a site; a factorized site can have no other than its own."""
    if isinstance(site.layer, Factorized):
        current = site.layer.scheme
        return current if policy.scheme == AUTO or get_scheme(policy.scheme).name == current.name else None
    return None if site.operation is None else scheme_for(site.operation, policy.scheme)

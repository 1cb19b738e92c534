"""What a policy proposes for one site, and what becomes of it once it is known how long each proposal takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self

from tdfx.cost.count import parameters
from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, get_scheme, scheme_for
from tdfx.factors.scheme import Scheme
from tdfx.layers.factorized import Factorized
from tdfx.passes.planning.site_cost import Chain, factor_chain, flops_of, keep, memory_of
from tdfx.passes.planning.spectra import unread
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.multiple import device_multiple, round_gently
from tdfx.ranks.rule import Choice, RankRule, round_ranks
from tdfx.ranks.spectrum import Spectrum

Gain = Callable[[Site, Chain], float]
"""From a site and a way to compute it to how many times faster that is than now."""

Read = Callable[[Site, Scheme], Sequence[Spectrum]]
"""Returns the spectra of what a site computes with now."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to factorize a site."""

    scheme: Scheme
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, decision: SitePlan) -> Self:
        """Return the way that a decision takes."""
        assert decision.scheme is not None
        assert decision.ranks is not None
        return cls(get_scheme(decision.scheme), decision.ranks)

    @property
    def chain(self) -> Chain:
        """How the site would be computed."""
        return factor_chain(self.scheme, self.ranks)


@dataclass(frozen=True, slots=True)
class Proposal:
    """The ways to factorize a site among which times decide."""

    site: Site
    policy: Policy
    """What is in force for the site."""
    kept: SitePlan
    """The decision if none of them pays, but for its note."""
    options: tuple[Candidate, ...]
    """The rule's own first, then what cuts less at the same ranks."""
    note: str = ""
    """What else there is to know of the ranks."""

    def settled(self, gain: Gain) -> SitePlan:
        """Return the decision: the option that gains most, unless not even that gains enough; all but its error."""
        gains = {option: gain(self.site, option.chain) for option in self.options}
        best = max(gains, key=lambda option: gains[option])
        if gains[best] < self.policy.min_gain:
            if self.kept.reason is Reason.FACTORIZED:
                return self.kept
            return replace(self.kept, note=why_no_gain(best.ranks, self.note, self.policy), gain=gains[best])
        return factorize(self.kept, self.site, best, self.note, gains[best])


def factorize(kept: SitePlan, site: Site, option: Candidate, note: str, gain: float) -> SitePlan:
    """Return the decision to factorize a site, made of that to keep it."""
    assert site.operation is not None
    return replace(
        kept,
        scheme=option.scheme.name,
        ranks=option.ranks,
        full_ranks=option.scheme.full_ranks(site.operation),
        reason=None,
        note=note,
        parameters_after=parameters(option.scheme.chain(site.operation, option.ranks)),
        flops_after=flops_of(site, option.chain),
        memory_after=memory_of(site, option.chain),
        gain=gain,
    )


def propose(
    site: Site, policy: Policy, scheme: Scheme, read: Read, gain: Gain, *, variants: bool = False
) -> SitePlan | Proposal:
    """Return the ways in which a policy's rule would factorize a site, or the decision to keep it.

    Args:
        site: Dense, or factorized already.
        policy: What is in force for it.
        scheme: What fits it.
        read: Called only if the decision depends on the weight.
        gain: By which a site that is too small is known before its weight is read.
        variants: Whether ``"auto"`` is to offer schemes that cut less at the same ranks too, for times to decide.
    """
    if isinstance(site.layer, Factorized):
        return _propose_lower(site, policy, scheme, read)
    operation = site.operation
    assert operation is not None
    full = scheme.full_ranks(operation)
    lowest = lowest_option(site, policy, scheme)
    most = gain(site, lowest.chain)
    kept = keep(site, Reason.TOO_SMALL, why_no_gain(lowest.ranks, "", policy), full)
    if most < policy.min_gain and not policy.rank.exact:
        return replace(kept, gain=most)
    choice = _choice(site, policy.rank, scheme, read)
    if choice.kept and not choice.signal and most < policy.min_gain:
        return replace(kept, gain=most)
    if choice.kept:
        return keep(site, Reason.EXCLUDED if choice.signal else Reason.NO_SIGNAL, choice.note or choice.kept, full)
    ranks = choice.ranks if choice.exact else rounded(choice.ranks, choice.limits or full, policy, site, scheme)
    options = [Candidate(scheme, ranks)]
    if variants and policy.scheme == AUTO and not choice.exact:
        options += (Candidate(get_scheme(name), few) for name, few in scheme.partial(ranks))
    return Proposal(site, policy, keep(site, Reason.NO_GAIN, "", full), tuple(options), choice.note)


def _propose_lower(site: Site, policy: Policy, scheme: Scheme, read: Read) -> SitePlan | Proposal:
    """Propose lower ranks for a site that is factorized, from its factors as they are now."""
    assert isinstance(site.layer, Factorized)
    assert site.operation is not None
    kept = keep(site, Reason.FACTORIZED, site.note)
    if not site.layer.trains:
        return kept
    now, full = site.layer.origin.ranks, scheme.full_ranks(site.operation)
    choice = _choice(site, policy.rank, scheme, read)
    if choice.kept:
        return kept
    wanted = choice.ranks if choice.exact else rounded(choice.ranks, choice.limits or full, policy, site, scheme)
    ranks = tuple(map(min, wanted, now))
    if ranks == now:
        return kept
    return Proposal(site, policy, kept, (Candidate(scheme, ranks),), f"{site.note} before")


def lowest_option(site: Site, policy: Policy, scheme: Scheme) -> Candidate:
    """Return a scheme at the lowest ranks that a policy can come to for a site."""
    assert site.operation is not None
    full = scheme.full_ranks(site.operation)
    ones = (1,) * len(full)
    return Candidate(scheme, ones if policy.rank.exact else rounded(ones, full, policy, site, scheme))


def scheme_of(site: Site, policy: Policy) -> Scheme | None:
    """Return the scheme that a policy means for a site; one that is factorized can have no other than its own."""
    if isinstance(site.layer, Factorized):
        own = site.layer.scheme
        return own if policy.scheme == AUTO or get_scheme(policy.scheme).name == own.name else None
    return None if site.operation is None else scheme_for(site.operation, policy.scheme)


def rounded(ranks: Sequence[int], limits: Sequence[int], policy: Policy, site: Site, scheme: Scheme) -> tuple[int, ...]:
    """Round so that the channels between the factors, of which a rank may stand for many, are what was asked for."""
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
    """Say what an operation looks like."""
    kernel = "×".join(map(str, operation.kernel))
    shape = f"a {kernel} kernel" if operation.dims else "a linear map"
    return f"{shape} in {operation.groups} groups" if operation.groups > 1 else shape


def _choice(site: Site, rule: RankRule, scheme: Scheme, read: Read) -> Choice:
    """Return what a rule chooses, and decompose nothing for one that does not look."""
    assert site.operation is not None
    spectra = read(site, scheme) if rule.reads_values else unread(scheme, site.operation)
    return rule.choose(_name_for(rule, site), spectra)


def _name_for(rule: RankRule, site: Site) -> str:
    """Return the name of a site by which a rule speaks of it."""
    spoken = (name for pattern in rule.patterns() for name in site.names if fnmatchcase(name, pattern))
    return next(spoken, site.name)

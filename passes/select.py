"""Sites + policy -> plan: a scheme and ranks for each site, or the reason why it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tdfx.cost.count import Flow, flops, parameters
from tdfx.errors import PolicyError, nearest
from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, scheme_for
from tdfx.factors.scheme import Scheme
from tdfx.layers import Factorized
from tdfx.passes.base import Change, Pass, PassResult, Program, Site
from tdfx.passes.weights import Spectra, check_weight, working_weight
from tdfx.plan import Plan, Reason, SitePlan
from tdfx.policy import Policy
from tdfx.ranks.rule import RankRule, round_ranks


class Select(Pass):
    """Decide for every site by the policy, and write the decision on the graph's nodes."""

    name = "select"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.spectra: Spectra = {}

    def requires(self, program: Program) -> None:
        """Every pattern matches some site, and every weight that may be split is finite."""
        names = [name for site in program.sites for name in site.names]
        for policy in _policies(self.policy):
            for setting, patterns in policy.patterns().items():
                for pattern in patterns:
                    _check_pattern(setting, pattern, names)
        for site in program.sites:
            if site.reason is None and self.policy.for_site(*site.names) is not None:
                check_weight(site)

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Decide site by site."""
        sites = tuple(self._decide(site) for site in program.sites)
        for site, decision in zip(program.sites, sites, strict=True):
            for node in site.nodes:
                node.meta["tdfx"] = decision
        counted = sum(parameter.numel() for parameter in program.module.parameters() if not _is_lazy(parameter))
        plan = Plan(
            sites=sites,
            emit=program.emit,
            notes=program.notes,
            model=type(program.module).__name__,
            policy=repr(self.policy),
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
            self.check(not (decision.factorized and site.reason), f"site {site.name!r} may not be rewritten")

    def _decide(self, site: Site) -> SitePlan:
        policy = self.policy.for_site(*site.names)
        if site.reason is not None:
            return _kept(site, site.reason, site.note)
        if policy is None:
            return _kept(site, Reason.EXCLUDED)
        assert site.operation is not None
        scheme = scheme_for(site.operation, policy.scheme)
        if scheme is None:
            asked = "no scheme stands" if policy.scheme == AUTO else f"{policy.scheme} does not stand"
            return _kept(site, Reason.NO_SCHEME, f"{asked} for {_geometry(site.operation)}")
        return self._rank(site, policy, scheme, site.operation)

    def _rank(self, site: Site, policy: Policy, scheme: Scheme, operation: Operation) -> SitePlan:
        full = scheme.full_ranks(operation)
        # What is rounded is the number of channels between the factors, of which a rank may stand for many.
        multiple = policy.round_to // math.gcd(policy.round_to, scheme.channels_per_rank(operation))
        lowest = round_ranks([1] * len(full), full, multiple)
        most = _gain(policy, operation, scheme.chain(operation, lowest), site.flows)
        if most < policy.min_gain and not policy.rank.exact:
            return replace(_kept(site, Reason.TOO_SMALL, _why_no_gain(lowest, "", policy), full), gain=most)
        weight = working_weight(site)
        spectra = scheme.spectra(operation, weight)
        choice = policy.rank.choose(_name_for(policy.rank, site), spectra)
        if choice.kept:
            return _kept(site, Reason.EXCLUDED if choice.signal else Reason.NO_SIGNAL, choice.note or choice.kept, full)
        ranks = choice.ranks if policy.rank.exact else round_ranks(choice.ranks, full, multiple)
        chain = scheme.chain(operation, ranks)
        gain = _gain(policy, operation, chain, site.flows)
        if gain < policy.min_gain:
            return replace(_kept(site, Reason.NO_GAIN, _why_no_gain(ranks, choice.note, policy), full), gain=gain)
        self.spectra[site.name] = spectra
        return replace(
            _kept(site, Reason.NO_GAIN, choice.note, full),
            scheme=scheme.name,
            ranks=ranks,
            reason=None,
            parameters_after=parameters(chain),
            flops_after=_flops(chain, site.flows),
            gain=gain,
            error=scheme.error(operation, weight, ranks, spectra),
        )


def _policies(policy: Policy) -> list[Policy]:
    nested = [one for one in policy.overrides.values() if one is not None]
    return [policy, *(deeper for one in nested for deeper in _policies(one))]


def _check_pattern(setting: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        known = f"Nearest: {nearest(pattern, names)}." if names else "The model has no convolution or linear layer."
        raise PolicyError(
            f"The pattern {pattern!r} in {setting} matches none of the model's {len(names)} sites: a policy that names "
            f"what is not there was written for another model. {known} tdfx.plan lists them all."
        )


def _kept(site: Site, reason: Reason, note: str = "", full: tuple[int, ...] | None = None) -> SitePlan:
    shape = site.operation.weight_shape if site.operation is not None else _shape(site.weight)
    count = _count(site)
    work = _flops([site.operation], site.flows) if site.operation is not None else None
    return SitePlan(
        name=site.name,
        kind=site.kind,
        parameter=site.slot.path if site.slot is not None else None,
        shape=shape,
        groups=site.operation.groups if site.operation is not None else 1,
        transposed=site.operation is not None and site.operation.transposed,
        calls=site.calls,
        full_ranks=full,
        reason=reason,
        note=note,
        parameters_before=count,
        parameters_after=count,
        flops_before=work,
        flops_after=work,
    )


def _is_lazy(parameter: object) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def _count(site: Site) -> int:
    """Count the values in a site's weight, or in its factors' where it is factorized."""
    weights = site.layer.weights if isinstance(site.layer, Factorized) else (site.weight,)
    return sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and not _is_lazy(weight))


def _shape(weight: object) -> tuple[int, ...]:
    return tuple(weight.shape) if isinstance(weight, Tensor) and not _is_lazy(weight) else ()


def _flops(chain: Sequence[Operation], flows: tuple[Flow, ...] | None) -> int | None:
    return None if flows is None else sum(flops(chain, flow) for flow in flows)


def _gain(policy: Policy, dense: Operation, chain: Sequence[Operation], flows: tuple[Flow, ...] | None) -> float:
    """Return how many times faster the site's step becomes, over all its calls."""
    each = flows or (None,)
    before = sum(policy.cost.seconds([dense], flow) for flow in each)
    after = sum(policy.cost.seconds(chain, flow) for flow in each)
    return before / after


def _why_no_gain(ranks: tuple[int, ...], note: str, policy: Policy) -> str:
    chosen = f"at ranks {'/'.join(map(str, ranks))}; {policy.min_gain:g}x was asked"
    return f"{chosen}; {note}" if note else chosen


def _name_for(rule: RankRule, site: Site) -> str:
    """Return the name of a site by which a rule speaks of it."""
    spoken = (name for name in site.names if any(fnmatchcase(name, pattern) for pattern in rule.patterns()))
    return next(spoken, site.name)


def _geometry(operation: Operation) -> str:
    kernel = "×".join(map(str, operation.kernel))
    shape = f"a {kernel} kernel" if operation.dims else "a linear map"
    return f"{shape} in {operation.groups} groups" if operation.groups > 1 else shape

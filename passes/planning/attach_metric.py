"""Moments + policy -> sites with the metric in which their weights are split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tdfx.errors import PolicyError
from tdfx.factors.metric import Metric, MetricName
from tdfx.factors.moments import moment_shape
from tdfx.passes.analysis.moments import Moments
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import Program, Site
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy
from tdfx.text import first_names

Wanted = Callable[[Site], str]
"""From a site to the metric that is wanted for it; "auto" for the best that the moments give."""


class AttachMetric(Pass[PassResult]):
    """Give every open site the metric that a policy, or a plan made before, asks for, as far as there are moments."""

    name = "attach_metric"

    def __init__(self, moments: Moments | None, wish: Policy | Plan) -> None:
        self.moments = moments
        self.wanted: Wanted = _by_plan(wish) if isinstance(wish, Plan) else _by_policy(wish)
        self.strict = isinstance(wish, Policy)
        """Whether a metric that the moments cannot give is an error."""

    def requires(self, program: Program) -> None:
        """A metric that the policy asks for by name has its moments, and these were collected."""
        if self.moments is not None and not self.moments.units:
            raise PolicyError(
                "moments= has seen no training step: it counts a forward pass of the model and its backward pass. Take a "
                "few steps before you pass it, or leave it out."
            )
        for site in program.sites if self.strict and self.moments is None else ():
            if site.is_open and (name := self.wanted(site)) in {"loss", "inputs"}:
                raise PolicyError(
                    f"metric={name!r} needs the second moments of a few training steps, and none were given. Collect them "
                    f"with tdfx.Moments(model) and pass moments=, or leave metric out."
                )

    def run(self, program: Program) -> PassResult:
        """Make the metrics of all sites; the processes have the same moments."""
        if self.moments is None:
            return PassResult(program)
        self.moments.average(program.processes)
        sites = tuple(self._with_metric(site) if site.is_open else site for site in program.sites)
        measured = [site for site in sites if site.metric is not None]
        notes = (*program.notes, *self._notes([site for site in sites if site.is_open], measured))
        changes = tuple(
            Change(site.name, f"errors in the metric of the {site.metric.name}") for site in measured if site.metric
        )
        return PassResult(replace(program, sites=sites, notes=notes), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """The sites are the same, in the same order."""
        names_before, names = ([site.name for site in program.sites] for program in (before, result.program))
        self.check(names_before == names, "no site is lost or moved")

    def _with_metric(self, site: Site) -> Site:
        """Return a site with its metric; without one where the weights are wanted, or nothing was seen of the site."""
        assert self.moments is not None
        name, moments = self.wanted(site), self.moments.of(site.weight_path)
        if moments is None or moments.inputs is None or name == "weights":
            return site
        if moments.outputs is None and name != "inputs":
            return site
        operation = site.known_operation
        sides = ((moments.inputs, operation.in_channels), (moments.outputs, operation.out_channels))
        # An attention that computes its projections in some calls together was recorded as one map, or not at all.
        if any(side is not None and tuple(side.shape) != moment_shape(operation.groups, size) for side, size in sides):
            return site
        metric: MetricName = "inputs" if name == "inputs" else "loss"
        return replace(site, metric=Metric.of(moments, metric))

    def _notes(self, sites: Sequence[Site], measured: Sequence[Site]) -> list[str]:
        notes = []
        if long := [site.name for site in measured if site.metric is not None and site.metric.is_diagonal]:
            notes.append(f"the channels of a long side are weighed one by one in {first_names(long)}")
        unseen = [site.name for site in sites if site.metric is None and self.wanted(site) != "weights"]
        if unseen and measured:
            notes.append(f"no moments were seen of {first_names(unseen)}: errors of the weights there")
        return notes


def _by_policy(policy: Policy) -> Wanted:
    def wanted(site: Site) -> str:
        resolved = policy.for_site(*site.names)
        return "weights" if resolved is None else resolved.metric

    return wanted


def _by_plan(plan: Plan) -> Wanted:
    metrics = {decision.name: decision.metric for decision in plan}
    return lambda site: metrics.get(site.name, "weights")

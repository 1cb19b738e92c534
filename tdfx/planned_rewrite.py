"""A plan for a model in training and the rewrite by it: what ``plan``, ``rewrite`` and ``Switch`` share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn

from tdfx.cost.measured import Measured
from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import ModelError, OptimizerError, PolicyError, TdfxWarning
from tdfx.optim.companions import Companions
from tdfx.optim.exchanges import split_exchange
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.analysis.loop import LoopSettings
from tdfx.passes.analysis.moments import Moments
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.pipeline import Planned, find_sites, make_plan, rewrite_by
from tdfx.passes.planning.spectra import SpectrumCache
from tdfx.passes.program import Program
from tdfx.passes.transform.rewrite import Init
from tdfx.passes.transform.statistics import renew_statistics
from tdfx.plans.plan import Emit, Plan
from tdfx.policies.policy import Policy, map_costs
from tdfx.text import without_addresses
from tdfx.wrappers.unwrap import Unwrapped, unwrap


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """By what a plan is to be made."""

    policy: Policy | None = None
    """Default: ``Policy()``."""
    inputs: Inputs | None = None
    emit: Emit = "graph"
    moments: Moments | None = None
    loop_seconds: float | None = None
    """Time of a step in the training loop, in seconds, if known."""
    loop: LoopSettings | None = None
    """What is in force in the loop, if known."""
    optimizer: Any = None
    """The optimizer of the loop, or several, whose step is timed; None if that is not known."""


@dataclass(frozen=True, slots=True)
class PlannedRewrite:
    """A plan for a model in training, with everything that the rewrite needs, so that no work is done twice."""

    unwrapped: Unwrapped
    planned: Planned
    moments: Moments | None = None

    @property
    def plan(self) -> Plan:
        """The decisions."""
        return self.planned.plan

    def apply(
        self,
        optimizer: Any = None,
        averaged: Any = None,
        masters: Any = None,
        init: Init = "weight",
        carry_state: bool | None = None,
    ) -> nn.Module:
        """Return the rewritten model; the arguments are those of ``rewrite``, and the model must not have changed since."""
        with self.unwrapped.processes.raise_on_all():
            companions = Companions.of(self.unwrapped, optimizer, averaged, masters, carry_state=carry_state)
            commit = prepare_rewrite(self.planned, companions, init, self.moments)
        return commit()


def plan_rewrite(model: nn.Module, request: PlanRequest) -> PlannedRewrite:
    """Make a plan as ``plan`` does."""
    if request.moments is not None:
        request.moments.remove()  # hooks would be taken for the user's own
    unwrapped = unwrap(model)
    with unwrapped.processes.raise_on_all():
        check_same_arguments(unwrapped, request.policy, request.emit)
        return PlannedRewrite(unwrapped, plan_by_policy(unwrapped, request), request.moments)


def check_same_arguments(
    unwrapped: Unwrapped, policy: Policy | Plan | None, emit: Emit, init: Init | None = None
) -> None:
    """Raise ModelError unless all processes pass the same arguments."""
    text = policy.to_json() if isinstance(policy, Plan) else repr(policy)
    # The default repr of an object contains its address, which differs between processes.
    unwrapped.processes.check_same(
        (without_addresses(text), emit, init),
        "The processes pass different policies, plans or settings to tdfx. Pass the same ones on each.",
    )


def check_init(init: Init, policy: Policy | Plan | None, companions: Companions) -> None:
    """Raise an error unless ``init`` is known and goes with the other arguments of ``rewrite``."""
    if init not in get_args(Init):
        raise PolicyError(
            f"init={init!r} is not known: factors start from the 'weight', as after training, from its 'variance', for a "
            f"model that was not trained yet, or 'empty', where values will be loaded."
        )
    if init == "empty" and not isinstance(policy, Plan):
        raise PolicyError(
            "init='empty' reads no weight, and a policy would choose ranks by them. Pass the plan in place of the policy: "
            "tdfx.Plan.from_json, or tdfx.plan of a model that has its values."
        )
    if init == "empty" and any(optimizer.state for optimizer in companions.optimizers):
        raise OptimizerError(
            "init='empty' makes factors without values, and the optimizer's state could not be carried to them. Pass an "
            "optimizer that has taken no step, and load its state afterwards."
        )
    if init == "empty" and companions.averages:
        raise ModelError(
            "init='empty' makes factors without values, in whose bases no average could be expressed. Load the average by "
            "itself: rewrite the averaged copy with init='empty' too, and load its values."
        )


def warn_of_metric(plan: Plan, companions: Companions) -> None:
    """Warn if a model in the middle of a training would be split by its weights, though the plan chose ranks otherwise."""
    sites = [site.name for site in plan.factorized if site.metric != "weights"]
    if sites and any(optimizer.state for optimizer in companions.optimizers):
        warnings.warn(
            f"The plan chose the ranks of {len(sites)} sites, {sites[0]!r} first, by moments, and none were given: the "
            f"weights themselves are split, which loses more than the plan says. Pass the same moments=.",
            TdfxWarning,
            stacklevel=4,
        )


def plan_by_policy(unwrapped: Unwrapped, request: PlanRequest) -> Planned:
    """Trace the model, find its sites, and decide for each by the policy."""
    policy = Policy() if request.policy is None else request.policy
    if not isinstance(policy, Policy):
        raise PolicyError(
            f"policy={policy!r} is a {type(policy).__name__}: it says what to rewrite and how far. Pass "
            f"tdfx.Policy(rank=...), or a plan to rewrite."
        )
    program, inputs = sites_of(unwrapped, request.emit), request.inputs
    if inputs is not None and request.optimizer is not None and policy.min_gain > 0:
        policy = _with_optimizer(policy, request.optimizer)
    if unwrapped.compiled and inputs is not None and isinstance(policy.cost, MeasuringCost) and policy.min_gain > 0:
        note = "its layers are timed as they run eagerly; compiled, they may gain less or more"
        program = replace(program, notes=(*program.notes, note))
    seconds, loop = request.loop_seconds, request.loop
    return make_plan(program, policy, inputs, moments=request.moments, loop_seconds=seconds, loop=loop)


def _with_optimizer(policy: Policy, optimizer: Any) -> Policy:
    """Return a policy whose costs count the time of an optimizer's step; one that cannot be carried over is left out."""
    try:
        optimizers = as_optimizers(optimizer)
    except OptimizerError:
        return policy
    return map_costs(policy, lambda cost: cost.with_optimizers(optimizers) if isinstance(cost, Measured) else cost)


def sites_of(unwrapped: Unwrapped, emit: Emit) -> Program:
    """Trace a model that was taken out of its wrappers, and find its sites."""
    return find_sites(
        unwrapped.model, emit, unwrapped.processes, shards=unwrapped.shards, surroundings=unwrapped.surroundings
    )


def prepare_rewrite(
    planned: Planned, companions: Companions, init: Init, moments: Moments | None
) -> Callable[[], nn.Module]:
    """Factorize the model and work out all changes of its companions; return the function that makes the changes."""
    masters = companions.masters
    if masters:
        # The masters are decomposed, so the spectra of the plan, which are those of the model's own weights, are not used.
        planned = Planned(planned.program.in_copy(masters.with_masters(planned.program.module)), SpectrumCache())
    rewritten = rewrite_by(planned, init)
    if moments is not None and rewritten.swaps and init != "empty":
        renew_statistics(rewritten.program, moments.batches)
    swaps = (replace(swap, factorized=masters.keep_masters(swap.factorized)) for swap in rewritten.swaps)
    exchanges = [split_exchange(swap) for swap in swaps]
    return companions.prepare(rewritten.program.module, exchanges, values=init != "empty", warn=True)

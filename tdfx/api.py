"""plan, rewrite, merge: the passes in order, and the optimizer along with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import nn
from torch.optim import Optimizer

from tdfx.errors import ModelError, OptimizerError, PolicyError
from tdfx.optim.companions import Companions
from tdfx.optim.exchanges import join_exchange, split_exchange
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.pipeline import Planned, find_sites, make_plan, merge_back, rewrite_by, use_plan
from tdfx.passes.planning.spectra import SpectrumCache
from tdfx.passes.program import Program
from tdfx.passes.transform.rewrite import Init
from tdfx.plans.plan import Emit, Plan
from tdfx.policies.policy import Policy
from tdfx.wrappers.unwrap import Wrapped, unwrap


def plan(
    model: nn.Module,
    policy: Policy | None = None,
    *,
    example_inputs: Inputs | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    emit: Emit = "graph",
) -> Plan:
    """Say what ``rewrite`` would do, and change nothing.

    Args:
        model: Any module. It is not changed; what is run, in eval mode and for some models in train mode, is a copy.
        policy: What to rewrite and how far; ``Policy()`` if left out.
        example_inputs: Inputs that the model accepts, for the FLOPs and times of each site: a tensor, a tuple of
            positional arguments, or a mapping of keyword arguments. Without them nominal shapes are assumed.
        optimizer: What trains the model; read, and only by a budget whose ``error`` is ``"curvature"``.
        masters: The wider copies that the optimizer trains, as for ``rewrite``; for the same budget.
        emit: How ``rewrite`` is to give the model back: ``"graph"`` or ``"modules"``.

    Returns:
        The plan, which prints as a table, and which ``rewrite`` takes in place of the policy.

    Raises:
        ModelError: The model is not a module, or is wrapped.
        PolicyError: A pattern matches no site, or given ranks do not fit.
        InputError: The model does not accept the example inputs.
        WeightError: A weight that may be split holds NaN or infinity.

    Example:
        >>> import tdfx, torch
        >>> made = tdfx.plan(torch.nn.Linear(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> made.sites[0].scheme, made.sites[0].ranks, made.sites[0].parameters_after
        ('svd', (16,), 2048)
    """
    return plan_rewrite(model, policy, example_inputs=example_inputs, emit=emit).plan


@dataclass(frozen=True, slots=True)
class PlannedRewrite:
    """A plan for a model in training, with all that a rewrite by it needs, so that nothing is done twice."""

    wrapped: Wrapped
    planned: Planned

    @property
    def plan(self) -> Plan:
        """The decisions."""
        return self.planned.plan

    @property
    def program(self) -> Program:
        """The model as the passes see it, with its sites."""
        return self.planned.program

    def carry_out(
        self,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        averaged: Any = None,
        masters: Any = None,
        init: Init = "weight",
    ) -> nn.Module:
        """Return the rewritten model; see ``rewrite``.

        The model and its weights must be as they were when the plan was made.
        """
        with self.wrapped.processes.raise_on_all():
            companions = Companions.of(self.wrapped, optimizer, averaged, masters)
            commit = _prepared(self.wrapped, self.planned, companions, init)
        return commit()


def plan_rewrite(
    model: nn.Module,
    policy: Policy | None = None,
    *,
    example_inputs: Inputs | None = None,
    emit: Emit = "graph",
) -> PlannedRewrite:
    """Make a plan as ``plan`` does, and return it with all that a rewrite by it needs."""
    wrapped = unwrap(model)
    with wrapped.processes.raise_on_all():
        _check_same(wrapped, policy, emit)
        return PlannedRewrite(wrapped, _planned(wrapped, policy, example_inputs, emit))


def rewrite(
    model: nn.Module,
    policy: Policy | Plan | None = None,
    *,
    example_inputs: Inputs | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    averaged: Any = None,
    masters: Any = None,
    emit: Emit = "graph",
    init: Init = "weight",
) -> nn.Module:
    """Return the model with its sites factorized, to go on training with.

    The model passed in is left as it was, and shares with the result every parameter that was not factorized. Call this
    between a backward and the next forward, best after an optimizer step; gradients that wait for a step, as in gradient
    accumulation, are carried over by the chain rule.

    A model that ``fully_shard`` (FSDP2) was called on comes back sharded at the same modules with the same settings. Each of
    its processes must make this call, and ``plan`` and ``merge``, with arguments that agree; no process ever holds more of
    the model than its shards and a few weights.

    Args:
        model: Any module.
        policy: A policy, or a plan made by ``tdfx.plan`` for this model; ``Policy()`` if left out.
        example_inputs: As for ``plan``; a plan that is passed in needs none.
        optimizer: The optimizer that trains the model, or a list of them. Afterwards it holds the parameters of the
            returned model, in the same groups with the same settings, momentum and step counts carried over.
        averaged: An average of the model that is kept beside it, as ``torch.optim.swa_utils.AveragedModel`` or anything
            else that holds the averaged copy as ``module``, or a list of them. Afterwards it holds one of the returned
            model, in the model's own bases, so that it can go on being updated.
        masters: Where the optimizer trains wider copies of the model's parameters, float32 beside bfloat16 or float16 say:
            a dict from each parameter to its master, a list of such pairs, or two lists side by side, parameters first. It
            is brought up to date in place: entries of weights that were factorized go, those of the factors take their
            place, and all others stay the same objects. It is the masters that are decomposed; the optimizer holds the
            factors' masters, and the model their rounded values. Ranks are chosen by the model's own weights, as ``plan``
            shows them. A parameter that the optimizer holds itself needs no master.
        emit: ``"graph"`` for a ``GraphModule`` where the model allows it, ``"modules"`` for the model's own class. A plan
            that is passed in says this itself.
        init: What the factors start from. ``"weight"``: the nearest to the trained weight. ``"variance"``, for a model that
            was not trained yet: the same directions, scaled so that the joined weight has the variance of the weight that
            was drawn, and with it the activations and gradients of the first step (the condition of Pan et al., *A Unified
            Weight Initialization Paradigm for Tensorial Convolutional Neural Networks*, ICML 2022). Give ranks by
            ``Ratio`` or ``Fixed`` then: an untrained weight has no signal for other rules. ``"empty"``, with a plan:
            nothing; no value is read or decomposed, so the model may lie on the meta device. Load the values next.

    Returns:
        The rewritten model, on the same device, with the same mode, dtypes, hooks and buffers.

    Raises:
        ModelError, PolicyError, InputError, WeightError: As for ``plan``.
        PlanError: The plan was made for another model.
        OptimizerError: The optimizer does not hold the weights to be replaced, or the masters do not go with the model.
        ModelError: An average belongs to another model.
    """
    wrapped = unwrap(model)
    with wrapped.processes.raise_on_all():
        companions = Companions.of(wrapped, optimizer, averaged, masters)
        _check_init(init, policy, companions)
        _check_same(wrapped, policy, emit, init)
        if isinstance(policy, Plan):
            planned = use_plan(_sites(wrapped, policy.emit), policy)
        else:
            planned = _planned(wrapped, policy, example_inputs, emit)
        commit = _prepared(wrapped, planned, companions, init)
    return commit()


def merge(
    model: nn.Module,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    averaged: Any = None,
    masters: Any = None,
) -> nn.Module:
    """Return the original architecture with the factors multiplied out: same class, same state_dict keys.

    The factorized model is left as it was, and shares with the result every parameter that is not a factor.

    Args:
        model: What ``rewrite`` returned, trained further or not.
        optimizer: The optimizer that trains it, if training goes on; it then holds the merged model's parameters.
        averaged: An average of the model, as for ``rewrite``; it is merged too, from its own factors.
        masters: Wider copies of the parameters that the optimizer trains, as for ``rewrite``; they are joined, and the
            model gets the rounded result.

    Raises:
        MergeError: The model did not come from ``rewrite``.
        OptimizerError: The optimizer does not hold the factors, or the masters do not go with the model.

    Example:
        >>> import tdfx, torch
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> small = tdfx.rewrite(dense, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> list(tdfx.merge(small).state_dict()) == list(dense.state_dict())
        True
    """
    wrapped = unwrap(model)
    with wrapped.processes.raise_on_all():
        companions = Companions.of(wrapped, optimizer, averaged, masters)
        merged = merge_back(companions.masters.with_masters(wrapped.model), wrapped.processes)
        commit = companions.prepare(merged.program.module, [join_exchange(join) for join in merged.joins])
    return commit()


def _check_same(wrapped: Wrapped, policy: Policy | Plan | None, emit: Emit, init: Init | None = None) -> None:
    """Raise ModelError unless all processes pass the same."""
    said = policy.to_json() if isinstance(policy, Plan) else repr(policy)
    # Objects that do not say what they are print their address, which differs between processes.
    wrapped.processes.check_same(
        (re.sub(r" at 0x[0-9a-f]+", "", said), emit, init),
        "The processes pass different policies, plans or settings to tdfx. Pass the same ones on each.",
    )


def _check_init(init: Init, policy: Policy | Plan | None, companions: Companions) -> None:
    """Raise an error where factors cannot start from what was asked for."""
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
    if init == "empty" and any(one.state for one in companions.optimizers):
        raise OptimizerError(
            "init='empty' makes factors without values, for which the state that the optimizer has already could not be "
            "worked out. Pass an optimizer that has taken no step, and load its state afterwards."
        )
    if init == "empty" and companions.averages:
        raise ModelError(
            "init='empty' makes factors without values, in whose bases no average could be expressed. Load the average by "
            "itself: rewrite the averaged copy with init='empty' too, and load its values."
        )


def _planned(wrapped: Wrapped, policy: Policy | None, inputs: Inputs | None, emit: Emit) -> Planned:
    """Trace the model, find its sites and decide on them."""
    wish = Policy() if policy is None else policy
    if not isinstance(wish, Policy):
        raise PolicyError(
            f"policy={wish!r} is a {type(wish).__name__}: it says what to rewrite and how far. "
            f"Pass tdfx.Policy(rank=...), or a plan to rewrite."
        )
    return make_plan(_sites(wrapped, emit), wish, inputs)


def _sites(wrapped: Wrapped, emit: Emit) -> Program:
    return find_sites(wrapped.model, emit, wrapped.processes, shards=wrapped.shards)


def _prepared(wrapped: Wrapped, planned: Planned, companions: Companions, init: Init) -> Callable[[], nn.Module]:
    """Factorize the model and work out all that goes with it; return the function that changes what was passed."""
    masters = companions.masters
    if masters:
        # The spectra of the plan are those of the model's own weights, and it is the masters that are split.
        planned = Planned(planned.program.in_copy(masters.with_masters(planned.program.module)), SpectrumCache())
    rewritten = rewrite_by(planned, init)
    exchanges = [
        split_exchange(replace(swap, factorized=masters.detached(swap.factorized))) for swap in rewritten.swaps
    ]
    return companions.prepare(rewritten.program.module, exchanges, values=init != "empty", warn=True)

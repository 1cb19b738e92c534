"""plan, rewrite, merge: the passes in order, and the optimizer along with them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn
from torch.optim import Optimizer

from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import ModelError, OptimizerError, PolicyError
from tdfx.optim.companions import Companions
from tdfx.optim.exchanges import join_exchange, split_exchange
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.planning.clock import TimeStep
from tdfx.passes.planning.select import Select
from tdfx.passes.planning.spectra import KeptSpectra
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.program import Program
from tdfx.passes.transform.merge import Merge
from tdfx.passes.transform.rewrite import Init, Rewrite
from tdfx.plans.plan import Emit, Plan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
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
        optimizer: Not used; accepted for compatibility.
        masters: Not used; accepted for compatibility.
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
    wrapped = unwrap(model)
    with wrapped.together():
        _check_same(wrapped, policy, emit)
        program, _ = _planned(wrapped, policy, example_inputs, emit)
    assert program.plan is not None
    return program.plan


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
    with wrapped.together():
        along = Companions.of(wrapped, optimizer, averaged, masters)
        _check_init(init, policy, along)
        _check_same(wrapped, policy, emit, init)
        spectra = KeptSpectra()
        if isinstance(policy, Plan):
            program = replace(_sites(wrapped, policy.emit), plan=wrapped.agree(policy))
        else:
            program, select = _planned(wrapped, policy, example_inputs, emit)
            # Those of the model's weights are not quite those of their masters.
            spectra = KeptSpectra() if along.masters else select.readings.kept
        along.masters.with_masters(program.module)
        step = Rewrite(spectra, init, wrapped.spread)
        result = step(program).program.module
        exchanges = [
            split_exchange(replace(one, factorized=along.masters.detached(one.factorized))) for one in step.swaps
        ]
        commit = along.prepare(result, exchanges, values=init != "empty", warn=True)
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
    with wrapped.together():
        along = Companions.of(wrapped, optimizer, averaged, masters)
        step = Merge(wrapped.spread)
        result = step(Program(module=along.masters.lifted_copy(wrapped.model))).program.module
        commit = along.prepare(result, [join_exchange(one) for one in step.joins])
    return commit()


def _check_same(wrapped: Wrapped, policy: Policy | Plan | None, emit: Emit, init: Init | None = None) -> None:
    """Raise ModelError unless all processes pass the same."""
    said = policy.to_json() if isinstance(policy, Plan) else repr(policy)
    # Objects that do not say what they are print their address, which differs between processes.
    wrapped.check_same(
        (re.sub(r" at 0x[0-9a-f]+", "", said), emit, init),
        "The processes pass different policies, plans or settings to tdfx. Pass the same ones on each.",
    )


def _check_init(init: Init, policy: Policy | Plan | None, along: Companions) -> None:
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
    if init == "empty" and any(one.state for one in along.optimizers):
        raise OptimizerError(
            "init='empty' makes factors without values, for which the state that the optimizer has already could not be "
            "worked out. Pass an optimizer that has taken no step, and load its state afterwards."
        )
    if init == "empty" and along.averages:
        raise ModelError(
            "init='empty' makes factors without values, in whose bases no average could be expressed. Load the average by "
            "itself: rewrite the averaged copy with init='empty' too, and load its values."
        )


def _planned(wrapped: Wrapped, policy: Policy | None, inputs: Inputs | None, emit: Emit) -> tuple[Program, Select]:
    """Run the passes up to the plan."""
    wish = Policy() if policy is None else policy
    if not isinstance(wish, Policy):
        raise PolicyError(
            f"policy={wish!r} is a {type(wish).__name__}: it says what to rewrite and how far. "
            f"Pass tdfx.Policy(rank=...), or a plan to rewrite."
        )
    program = _sites(wrapped, emit)
    spent = 0.0
    if inputs is not None:
        program = ObserveInputs(inputs, wrapped.together, wrapped.ready, wrapped.agree)(program).program
        if isinstance(wish.rank, Budget) and wish.rank.is_of_time and isinstance(wish.cost, MeasuringCost):
            began = time.perf_counter()
            program = TimeStep(inputs, wish.cost, wrapped.lead, strict=wish.rank.strict)(program).program
            spent = time.perf_counter() - began
    select = Select(wish, wrapped.spread, wrapped.agree, SiteTimes(wrapped.lead, spent))
    return select(program).program, select


def _sites(wrapped: Wrapped, emit: Emit) -> Program:
    if emit not in get_args(Emit):
        raise PolicyError(
            f"emit={emit!r} is not known: a model is given back as 'graph' (a GraphModule) or as 'modules' (its own class)."
        )
    notes: tuple[str, ...] = ()
    if wrapped.shards and emit == "graph":
        emit = "modules"
        kind = type(wrapped.model).__name__
        notes = (f"given back as {kind}, not as a graph: fully_shard gathers parameters where modules are called",)
    program = Program(module=wrapped.model, emit=emit, notes=notes, shards=wrapped.shards)
    return Find()(Trace()(program).program).program

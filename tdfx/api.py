"""The public functions ``plan``, ``rewrite`` and ``merge``: they run the compiler and carry the optimizer along."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from tdfx.errors import TdfxWarning
from tdfx.optim.companions import Companions
from tdfx.optim.exchanges import join_exchange
from tdfx.passes.analysis.moments import Moments
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.pipeline import merge_back, use_plan
from tdfx.passes.transform.merge import is_rewritten
from tdfx.passes.transform.rewrite import Init
from tdfx.planned_rewrite import (
    PlanRequest,
    check_init,
    check_same_arguments,
    plan_by_policy,
    plan_rewrite,
    prepare_rewrite,
    sites_of,
    warn_of_metric,
)
from tdfx.plans.plan import Emit, Plan
from tdfx.policies.policy import Policy
from tdfx.wrappers.unwrap import unwrap


def plan(
    model: nn.Module,
    policy: Policy | None = None,
    *,
    example_inputs: Inputs | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    masters: Any = None,
    emit: Emit = "graph",
    moments: Moments | None = None,
) -> Plan:
    """Return what ``rewrite`` would do to each layer, or why it would keep the layer, without changing anything.

    Args:
        model: Any module. The compiler runs a copy of it, in eval mode and for some models in train mode too.
        policy: Which layers to factorize, and at which ranks. Default: ``Policy()``.
        example_inputs: Inputs that the model accepts: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. The FLOPs and times of layers are those at their shapes; without them, at nominal shapes.
        optimizer: The optimizer that trains the model, or several: where layers are timed, so is its step.
        masters: Not used; accepted so that calls written for earlier versions still work.
        emit: The form of the model that ``rewrite`` will return; see there.
        moments: What ``Moments`` has collected in training steps of the model: errors are measured by it, as
            ``Policy.metric`` says. Its hooks are taken off first.

    Returns:
        The plan. It prints as a table, converts to JSON by ``to_json()``, and can be passed to ``rewrite`` as the policy.

    Raises:
        ModelError: The model is not a module, or has a wrapper that cannot be taken off.
        PolicyError: A pattern of the policy matches no layer, or given ranks do not fit a layer.
        InputError: The model does not accept the example inputs.
        WeightError: A weight that may be factorized holds NaN or infinity.

    Example:
        >>> import tdfx, torch
        >>> plan = tdfx.plan(torch.nn.Linear(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> plan.sites[0].scheme, plan.sites[0].ranks, plan.sites[0].parameters_after
        ('svd', (16,), 2048)
    """
    return plan_rewrite(model, PlanRequest(policy, example_inputs, emit, moments, optimizer=optimizer)).plan


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
    moments: Moments | None = None,
    carry_state: bool | None = None,
) -> nn.Module:
    """Return a model in which layers are replaced by chains of smaller layers, and which goes on training.

    The model that is passed in is left as it was. The returned model shares with it every parameter that was not factorized.
    Call this between a backward and the next forward, best after an optimizer step. Gradients that were not applied yet, as
    in gradient accumulation, are carried to the factors by the chain rule.

    A model in DistributedDataParallel or ``torch.compile`` comes back in the same wrapper with the same settings, and one
    that ``fully_shard`` (FSDP2) was called on comes back sharded at the same modules; no process ever holds more of it than
    its shards and a few weights. All processes that train a model must make the same calls with the same arguments.

    Args:
        model: Any module.
        policy: Which layers to factorize, and at which ranks; or a plan that ``tdfx.plan`` made for this model. Default:
            ``Policy()``.
        example_inputs: As for ``plan``; not needed with a plan.
        optimizer: The optimizer that trains the model, or a list of several. It is changed in place: afterwards it holds the
            parameters of the returned model, in the same groups, and momentum is carried over; see ``carry_state``.
        averaged: An average of the model (EMA, SWA), or a list of several: a ``torch.optim.swa_utils.AveragedModel``, or any
            object that holds the averaged copy as ``module``. Afterwards it holds an average of the returned model, which
            can be updated further.
        masters: The wider copies of the model's parameters, for an optimizer that trains float32 copies of a bfloat16 or
            float16 model: a dict from each parameter to its master, a list of such pairs, or two lists, parameters first. It
            is updated in place: masters of the factors replace those of the weights that were factorized. The masters are
            decomposed, and the model gets rounded factors; ranks are chosen by the model's own weights. A parameter that the
            optimizer holds itself needs no master.
        emit: ``"graph"`` returns a ``GraphModule`` where the model's code can be represented as a graph, ``"modules"``
            always returns the model's own class. Not used with a plan, which records it.
        init: The initial values of the factors.
            ``"weight"``: the best approximation of the trained weight.
            ``"variance"``, for a model that was not trained yet: the same, scaled so that the joined weight has the variance
            of the original one, which keeps the scale of activations and gradients (Pan et al., *A Unified Weight
            Initialization Paradigm for Tensorial Convolutional Neural Networks*, ICML 2022). Choose ranks by ``Ratio`` or
            ``Fixed`` then: other rules look for structure that an untrained weight does not have.
            ``"empty"``, with a plan: uninitialized, to be loaded. No weight is read: the model may be on the meta device.
        moments: As for ``plan``. The running statistics of batch norms are estimated again too, from the last batches that
            were collected, since the rewritten model computes other activations. A plan that was made with moments needs
            them here too; without them its ranks are split by the weights.
        carry_state: Whether factors take over the state that the optimizer keeps of their weight, by the chain rule and by
            estimates of squares. False lets them begin as in a new optimizer, at the same learning rate. None, the default,
            does that to the factors of dense weights under Adam, AdamW, NAdam and RAdam, where it is measured to be
            better, and carries all else.

    Returns:
        The rewritten model, on the same device, in the same mode, with the same dtypes, hooks and buffers.

    Raises:
        ModelError: As for ``plan``; or an average belongs to another model.
        PolicyError: As for ``plan``; or ``init`` does not go with the other arguments.
        InputError, WeightError: As for ``plan``.
        PlanError: The plan was made for another model.
        OptimizerError: The optimizer does not hold the weights to be replaced, or the masters do not go with the model.

    Example:
        >>> import tdfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model = tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0), optimizer=optimizer)
        >>> [tuple(parameter.shape) for parameter in optimizer.param_groups[0]["params"]]
        [(16, 64), (64, 16), (64,)]
    """
    if moments is not None:
        moments.remove()  # hooks would be taken for the user's own
    unwrapped = unwrap(model)
    with unwrapped.processes.raise_on_all():
        companions = Companions.of(unwrapped, optimizer, averaged, masters, carry_state=carry_state)
        check_init(init, policy, companions)
        check_same_arguments(unwrapped, policy, emit, init)
        if isinstance(policy, Plan):
            if moments is None and init != "empty":
                warn_of_metric(policy, companions)
            planned = use_plan(sites_of(unwrapped, policy.emit), policy, moments)
        else:
            request = PlanRequest(policy, example_inputs, emit, moments, optimizer=optimizer)
            planned = plan_by_policy(unwrapped, request)
        commit = prepare_rewrite(planned, companions, init, moments)
    return commit()


def merge(
    model: nn.Module,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    averaged: Any = None,
    masters: Any = None,
) -> nn.Module:
    """Return the original architecture with the factors multiplied out: the same class and the same state_dict keys.

    The factorized model is left as it was. The returned model shares with it every parameter that is not a factor.

    Args:
        model: A model that ``rewrite`` returned, trained further or not. A dense model comes back as it is, with a warning
            unless it was merged already, or a ``Switch`` has decided to keep it.
        optimizer: As for ``rewrite``, if training goes on. Afterwards it holds the parameters of the merged model.
        averaged, masters: As for ``rewrite``. An average is merged from its own factors. Masters are joined, and the model
            gets the rounded weights.

    Returns:
        The merged model, on the same device, in the same mode, with the same dtypes, hooks and buffers.

    Raises:
        MergeError: The factors are not what ``rewrite`` made.
        ModelError: The model has a wrapper that cannot be taken off, or an average belongs to another model.
        OptimizerError: The optimizer does not hold the factors, or the masters do not go with the model.

    Example:
        >>> import tdfx, torch
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> small = tdfx.rewrite(dense, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> list(tdfx.merge(small).state_dict()) == list(dense.state_dict())
        True
    """
    unwrapped = unwrap(model)
    with unwrapped.processes.raise_on_all():
        companions = Companions.of(unwrapped, optimizer, averaged, masters)
        if not is_rewritten(unwrapped.model):
            if not is_known_dense(model) and not is_known_dense(unwrapped.model):
                warnings.warn(
                    f"{type(unwrapped.model).__name__} was never rewritten: it holds no factorized layer and no record of a "
                    f"rewrite, so it comes back as it is. If it should have been rewritten, see whether the model that "
                    f"tdfx.rewrite or Switch.step returned is the one that was trained.",
                    TdfxWarning,
                    stacklevel=2,
                )
            return model
        merged = merge_back(companions.masters.with_masters(unwrapped.model), unwrapped.processes)
        commit = companions.prepare(merged.program.module, [join_exchange(join) for join in merged.joins])
    dense = commit()
    record_dense(dense)
    return dense


_DENSE: WeakSet[nn.Module] = WeakSet()
"""The models that are known to be dense for a reason: they were merged, or a switch has decided to keep them."""


def record_dense(model: nn.Module) -> None:
    """Record that a model is dense for a reason, so that ``merge`` does not warn."""
    _DENSE.add(model)


def is_known_dense(model: nn.Module) -> bool:
    """Return True for a model that was merged, or kept by a switch."""
    return model in _DENSE

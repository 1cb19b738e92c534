"""Why a weight must be left alone, whatever the policy says."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tdfx.factors.operation import Operation
from tdfx.kinds.registry import kind_of, operation_of
from tdfx.layers.placement import is_sharded
from tdfx.passes.analysis.tracer import is_site_or_leaf
from tdfx.passes.analysis.uses import Uses
from tdfx.plans.plan import Reason


def layers_inside_leaves(module: nn.Module) -> dict[int, type[nn.Module]]:
    """Return the layers that lie inside a module which no graph looks into, with that module's class."""
    found: dict[int, type[nn.Module]] = {}
    for outer in module.modules():
        if is_site_or_leaf(outer):
            for inner in outer.modules():
                if inner is not outer:
                    found[id(inner)] = type(outer)
    return found


def obstacle_of_layer(
    layer: nn.Module, weight: nn.Parameter | None, calls: int, uses: Uses, inside: Mapping[int, type[nn.Module]]
) -> tuple[Reason | None, str]:
    """Return the first reason why no policy may rewrite a layer, and the reason in words."""
    kind = kind_of(layer)
    if isinstance(weight, UninitializedParameter):
        return Reason.UNINITIALIZED, "run one batch through the model first"
    if weight is None or parametrize.is_parametrized(layer):
        return Reason.PARAMETRIZED, "its weight is computed from other tensors"
    if layer._buffers or layer._modules or not set(layer._parameters) <= {kind.weight, kind.bias}:
        return Reason.CUSTOM_FORWARD, f"{type(layer).__name__} holds more than a weight and a bias"
    if not kind.is_intact(layer):
        return Reason.CUSTOM_FORWARD, f"{type(layer).__name__} does not compute what {kind.name} does"
    if id(layer) in inside:
        return Reason.READ_ELSEWHERE, read_by(inside[id(layer)])
    if id(weight) in uses.functional:
        return Reason.READ_ELSEWHERE, "forward reads its weight besides calling it"
    if calls == 0 and id(weight) not in uses.reads:
        return Reason.NOT_CALLED, "forward does not call it"
    return obstacle(weight, kind.name, operation_of(layer), uses.owners, uses.reads, uses.shards)


def obstacle(
    weight: nn.Parameter,
    kind: str,
    operation: Operation | None,
    owners: Mapping[int, int],
    reads: Collection[int],
    shards: bool = False,
) -> tuple[Reason | None, str]:
    """Return the first reason why no policy may rewrite a weight that is used as one, and the reason in words.

    Args:
        weight: The parameter.
        kind: What the plan calls the site.
        operation: What is computed with it, if a scheme can stand for it.
        owners: Parameter, by identity -> how many modules hold it.
        reads: Parameters, by identity, that something reads besides.
        shards: Whether a weight may be in shards that stand for a plain tensor.
    """
    if is_traceable_wrapper_subclass(weight) and not (shards and is_sharded(weight)):
        return Reason.PARAMETRIZED, f"its weight is a {type(weight.data).__name__}, which is no plain tensor"
    if owners[id(weight)] > 1:
        return Reason.TIED, f"{owners[id(weight)]} modules hold its weight"
    if id(weight) in reads:
        return Reason.READ_ELSEWHERE, "forward reads its weight without calling it"
    if not weight.requires_grad:
        return Reason.FROZEN, "its weight has requires_grad=False"
    if operation is None or weight.numel() == 0 or not weight.is_floating_point():
        return Reason.NO_SCHEME, f"no scheme for {kind} with a {weight.dtype} weight of {weight.numel()} values"
    return None, ""


def read_by(kind: type[nn.Module]) -> str:
    """Say that a module which no graph looks into may read a weight."""
    return f"{kind.__name__} may read its weight without calling it"

"""Why a weight must be kept, whatever the policy says."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tdfx.factors.operation import Operation
from tdfx.kinds.attention import is_attention
from tdfx.kinds.registry import kind_of, operation_of
from tdfx.layers.placement import is_sharded
from tdfx.passes.analysis.owners import Owners
from tdfx.passes.analysis.tracer import is_site_or_leaf
from tdfx.passes.analysis.uses import Uses
from tdfx.plans.plan import Reason

USED_TWICE = "forward uses its weight in two ways: its dimensions have other roles in one call than in another"
"""The note for a parameter whose calls differ in what they sum over."""


def layers_inside_leaves(root: nn.Module) -> dict[int, type[nn.Module]]:
    """Return the layers inside modules that no graph looks into: layer, by identity -> class of that module."""
    leaves = [module for module in root.modules() if is_site_or_leaf(module) and not is_attention(module)]
    return {id(layer): type(leaf) for leaf in leaves for layer in leaf.modules() if layer is not leaf}


def blocker_of_layer(
    layer: nn.Module, weight: nn.Parameter | None, calls: int, uses: Uses, inside: Mapping[int, type[nn.Module]]
) -> tuple[Reason | None, str]:
    """Return the first reason why no policy may rewrite a layer, and the reason in words; None and "" if one may.

    ``weight`` is None where it is computed from other tensors; ``calls`` counts those in one forward pass; ``inside`` is
    what ``layers_inside_leaves`` returns.
    """
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
        return Reason.READ_ELSEWHERE, note_of_reader(inside[id(layer)])
    if id(weight) in uses.functional:
        return Reason.READ_ELSEWHERE, "forward reads its weight besides calling it"
    if calls == 0 and id(weight) not in uses.reads:
        return Reason.NOT_CALLED, "forward does not call it"
    return blocker_of_weight(weight, kind.name, operation_of(layer), uses.owners, uses.reads, uses.shards)


def blocker_of_weight(
    weight: nn.Parameter,
    kind: str,
    operation: Operation | None,
    owners: Owners,
    reads: Collection[int],
    shards: bool = False,
) -> tuple[Reason | None, str]:
    """Return the first reason why no policy may rewrite a weight, and the reason in words; None and "" if one may.

    ``owners`` says who else holds each parameter, and ``reads`` are the parameters that something reads besides, by
    identity. With ``shards``, FSDP2 gathers sharded weights, so that they count as plain tensors.
    """
    if is_traceable_wrapper_subclass(weight) and not (shards and is_sharded(weight)):
        return Reason.PARAMETRIZED, f"its weight is a {type(weight.data).__name__}, which is no plain tensor"
    reason, note = owners.blocker(weight)
    if reason is not None:
        return reason, note
    if id(weight) in reads:
        return Reason.READ_ELSEWHERE, "forward reads its weight without calling it"
    if not weight.requires_grad:
        return Reason.FROZEN, "its weight has requires_grad=False"
    if operation is None or weight.numel() == 0 or not weight.is_floating_point():
        return Reason.NO_SCHEME, f"no scheme for {kind} with a {weight.dtype} weight of {weight.numel()} values"
    return None, ""


def note_of_reader(reader: type[nn.Module]) -> str:
    """Return the note for a weight inside a module that no graph looks into."""
    return f"{reader.__name__} may read its weight without calling it"

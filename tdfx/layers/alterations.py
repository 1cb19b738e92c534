"""Finding what was put on the factors of a layer since ``rewrite`` made them: adapters, hooks, pruning, quantization.

``merge`` joins weights. Whatever else takes part in the computation between the factors would be lost by that, so only
factors that are exactly as ``rewrite`` made them are joined, with other values at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tdfx.factors.operation import Operation
from tdfx.kinds.registry import find_kind, operation_of
from tdfx.kinds.stock import build_factor, build_layer
from tdfx.layers.factorized import Factorized, FactorizedByName
from tdfx.layers.module_state import HOOKS
from tdfx.layers.parameter import FactorizedParameter
from tdfx.layers.placement import is_sharded

_UNDO = "Undo that first, or keep it and do not merge."
_REMOVE_HOOKS = "Remove the hook first: call remove() of the handle that registering it returned."


def alteration_of(layer: Factorized) -> str:
    """Return what a factorized layer has that ``rewrite`` did not make, and what to do; "" if there is nothing.

    >>> import tdfx
    >>> alteration_of(tdfx.rewrite(nn.Linear(8, 8), tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)))
    ''
    """
    return next(_alterations(layer), "")


def _alterations(layer: Factorized) -> Iterator[str]:
    if type(layer) not in (Factorized, FactorizedByName, FactorizedParameter) or "forward" in layer.__dict__:
        yield f"its forward is no longer the one that it was made with. {_UNDO}"
    foreign = [*(layer._modules.keys() - {"factors"}), *layer._parameters, *layer._buffers]
    if foreign:
        yield f"it holds {foreign[0]!r} besides its factors. {_UNDO}"
    factors = layer._modules.get("factors")
    chain = layer.scheme.chain(layer.operation, layer.origin.ranks)
    if type(factors) is not nn.Sequential or "forward" in factors.__dict__:
        yield f"its factors are in a {type(factors).__name__} with a forward of its own. {_UNDO}"
        return
    if len(factors) != len(chain):
        names = ", ".join(type(factor).__name__ for factor in factors)
        yield f"it has {len(factors)} modules in the place of {len(chain)} factors: {names}. {_UNDO}"
    if hook := _hook_of(factors):
        yield f"its factors have {hook}. {_REMOVE_HOOKS}"
    for index, (factor, step) in enumerate(zip(factors, chain, strict=False)):
        may_have_bias = index == len(chain) - 1
        yield from (f"factor {index} {what}" for what in _alterations_of_factor(factor, step, may_have_bias))


def _alterations_of_factor(factor: nn.Module, step: Operation, may_have_bias: bool) -> Iterator[str]:
    name = type(factor).__name__
    if parametrize.is_parametrized(factor):
        parametrized = next(iter(cast("nn.ModuleDict", factor.parametrizations)))
        yield (
            f"computes its {parametrized} by a parametrization. Call "
            f"torch.nn.utils.parametrize.remove_parametrizations(factor, {parametrized!r}) first."
        )
    if prune.is_pruned(factor) and any(isinstance(hook, prune.BasePruningMethod) for hook in _hooks(factor)):
        yield "is pruned. Call torch.nn.utils.prune.remove(factor, 'weight') first."
    parameter = nn.Parameter(torch.empty(step.weight_shape, device="meta"))
    stock = build_layer(step, parameter, None)
    if type(factor) not in (type(stock), type(build_factor(step, parameter, None))):
        yield (
            f"is a {type(factor).__module__}.{name}, not the torch.nn.{type(stock).__name__} that rewrite made. Undo that "
            f"first: merge_and_unload() of an adapter, or take the model from before it was quantized."
        )
        return
    weight = factor._parameters.get("weight")
    names = {"weight", "bias"}
    if weight is None or not factor._parameters.keys() <= names or factor._modules or factor._buffers:
        extra = [*(factor._parameters.keys() - names), *factor._modules, *factor._buffers]
        yield f"holds {', '.join(map(repr, extra)) or 'no weight'} besides its weight. {_UNDO}"
    elif not weight.is_floating_point() or (is_traceable_wrapper_subclass(weight) and not is_sharded(weight)):
        yield f"has a weight of {weight.dtype} in a {type(weight.data).__name__}, so it is quantized. {_UNDO}"
    elif tuple(weight.shape) != step.weight_shape or operation_of(factor) != operation_of(stock):
        yield f"computes something else than at the rewrite: it is {factor} now. {_UNDO}"
    elif factor._parameters.get("bias") is not None and not may_have_bias:
        yield f"has a bias, and only the last factor may have one. {_UNDO}"
    kind = find_kind(factor)
    if "forward" in factor.__dict__ or kind is None or not kind.is_intact(factor):
        yield f"has another forward than {type(stock).__name__}. {_UNDO}"
    if hook := _hook_of(factor):
        yield f"has {hook}. {_REMOVE_HOOKS}"


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yield the hooks of a module's calls."""
    for name in HOOKS:
        hooks = module.__dict__[name]
        # Some of these attributes only say how a hook of another one is called: by identifiers, or by one flag.
        if isinstance(hooks, dict):
            yield from filter(callable, hooks.values())


def _hook_of(module: nn.Module) -> str:
    """Return in words the first hook of a module's calls; "" if it has none."""
    hook = next(_hooks(module), None)
    return "" if hook is None else f"a hook, {getattr(hook, '__qualname__', type(hook).__qualname__)}"

"""``FrobeniusDecay``: weight decay of the dense weights for which factors stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tdfx.errors import ModelError, OptimizerError
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full, shard_like
from tdfx.training.methods.step_hooks import check_holds, groups_by_parameter, refuse_closure


class FrobeniusDecay:
    """Weight decay of the dense weights for which factors stand, in place of the decay of the factors.

    Plain weight decay shrinks every factor by itself. That pulls their product towards lower rank and smaller scale than the
    same decay of the dense weight would, and costs accuracy. This uses the gradient of ``½·|join(factors)|²`` with the same
    coefficient: each group's ``weight_decay``, read at every step. It acts inside ``optimizer.step()``, before the gradients
    are used, so gradient clipping is not affected. Make a new one after another rewrite.

    Source: Khodak, Tenenholtz, Mackey, Fusi, *Initialization and Regularization of Factorized Neural Layers*, ICLR 2021.

    Args:
        model: A model that ``tdfx.rewrite`` returned.
        optimizer: The SGD, Adam or AdamW that trains it.

    Raises:
        ModelError: The model holds no factorized layer.
        OptimizerError: The optimizer is of another class, whose use of ``weight_decay`` is not known, or is fused, or holds
            none of the factors; at a step, that it is given a closure.

    Example:
        >>> import tdfx, torch
        >>> policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
        >>> model = tdfx.rewrite(torch.nn.Sequential(torch.nn.Linear(64, 64)), policy)
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> decay = tdfx.FrobeniusDecay(model, optimizer)
        >>> decay.remove()
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, SGD | Adam | AdamW):
            raise OptimizerError(
                f"tdfx does not know how {type(optimizer).__name__} uses weight_decay, so it could not put another decay in "
                f"its place. Use SGD, Adam or AdamW, or set weight_decay=0 for the factors."
            )
        self._layers = [module for module in model.modules() if isinstance(module, Factorized)]
        if not self._layers:
            raise ModelError(
                f"{type(model).__name__} holds no factorized layer whose decay could be replaced. Pass the model that "
                f"tdfx.rewrite returned, and make a new FrobeniusDecay after each rewrite."
            )
        weights = [weight for layer in self._layers for weight in layer.weights]
        check_holds(optimizer, weights, f"factors of this {type(model).__name__}")
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Give the factors their plain weight decay back."""
        self._handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        refuse_closure(args, kwargs)
        groups = groups_by_parameter(optimizer)
        for layer in self._layers:
            held = [(weight, groups[id(weight)]) for weight in layer.weights if id(weight) in groups]
            if any(group["weight_decay"] and weight.grad is not None for weight, group in held):
                decays = _dense_decay(layer)
                for weight, group in held:
                    if weight.grad is not None and id(weight) in decays:
                        _replace_decay(optimizer, weight, decays[id(weight)], group)


def _dense_decay(layer: Factorized) -> dict[int, Tensor]:
    """Return the gradients of half the squared Frobenius norm of the dense weight, by the id of each factor that trains."""
    values = [full(weight).requires_grad_(weight.requires_grad) for weight in layer.weights]
    with torch.enable_grad():
        half = 0.5 * layer.join(*values).abs().square().sum()
    trained = [weight for weight in layer.weights if weight.requires_grad]
    gradients = torch.autograd.grad(half, [value for value in values if value.requires_grad])
    return {id(weight): shard_like(gradient, weight) for weight, gradient in zip(trained, gradients, strict=True)}


def _replace_decay(optimizer: Optimizer, weight: nn.Parameter, decay: Tensor, group: dict[str, Any]) -> None:
    """Undo in advance what the step will do for ``weight_decay``, and apply another decay instead."""
    assert weight.grad is not None
    rate = float(group["weight_decay"])
    if isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False):
        rate *= float(group["lr"])
        weight.sub_(decay, alpha=rate).div_(1 - rate)
    else:
        sign = -1 if group.get("maximize", False) else 1
        weight.grad.add_(decay - weight, alpha=sign * rate)

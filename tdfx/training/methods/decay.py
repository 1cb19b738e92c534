"""Weight decay of the dense weights that factors stand for.

It hangs on an optimizer and acts inside its ``step``, after the gradients are there and before they are used, so a loop
needs no other change, and clipping sees nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tdfx.errors import ModelError, OptimizerError
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full, shard_like
from tdfx.training.methods.hooks import refuse_closure, refuse_fused


class FrobeniusDecay:
    """Weight decay of the dense weights that factors stand for, in place of that of the factors themselves.

    Plain weight decay shrinks every factor by itself, which pulls their product towards lower rank and smaller scale than
    the same decay of the dense weight would, and costs accuracy. This takes the gradient of ``½·|join(factors)|²`` for the
    same coefficient: each parameter group's own ``weight_decay``, read at every step, so schedulers and settings stay as
    they are. It acts until ``remove`` is called; make it anew after another rewrite.

    Source: Khodak, Tenenholtz, Mackey, Fusi, *Initialization and Regularization of Factorized Neural Layers*, ICLR 2021.

    Args:
        model: A model that ``tdfx.rewrite`` returned.
        optimizer: The SGD, Adam or AdamW that trains it.

    Raises:
        ModelError: The model holds no factorized layer.
        OptimizerError: The optimizer is of another class, so that it is not known what it makes of ``weight_decay``, or
            fused, or holds none of the factors; at a step, that it is given a closure.

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
                f"tdfx does not know what {type(optimizer).__name__} makes of weight_decay, so it could not put another "
                f"decay in its place. Use SGD, Adam or AdamW, or set weight_decay=0 for the factors."
            )
        refuse_fused(optimizer)
        self._layers = [one for one in model.modules() if isinstance(one, Factorized)]
        if not self._layers:
            raise ModelError(
                f"{type(model).__name__} holds no factorized layer whose decay could be another. Pass the model that "
                f"tdfx.rewrite returned, and make this anew after each rewrite."
            )
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if not any(id(weight) in held for layer in self._layers for weight in layer.weights):
            raise OptimizerError(
                f"The {type(optimizer).__name__} holds none of the factors of this {type(model).__name__}: it trains "
                f"another model, or wider copies of the parameters, whose decay this does not know. Pass the optimizer that "
                f"holds the model's own parameters."
            )
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Give the factors their plain weight decay back."""
        self._handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        refuse_closure(args, kwargs)
        groups = {id(one): group for group in optimizer.param_groups for one in group["params"]}
        for layer in self._layers:
            held = [(weight, groups[id(weight)]) for weight in layer.weights if id(weight) in groups]
            if any(group["weight_decay"] and weight.grad is not None for weight, group in held):
                wanted = _dense_decay(layer)
                for weight, group in held:
                    if weight.grad is not None and id(weight) in wanted:
                        _exchange_decay(optimizer, weight, wanted[id(weight)], group)


def _dense_decay(layer: Factorized) -> dict[int, Tensor]:
    """Return the gradients of half the squared Frobenius norm of the dense weight, by the factor that trains."""
    values = [full(weight).requires_grad_(weight.requires_grad) for weight in layer.weights]
    with torch.enable_grad():
        half = 0.5 * layer.join(*values).abs().square().sum()
    found = iter(torch.autograd.grad(half, [one for one in values if one.requires_grad]))
    return {id(weight): shard_like(next(found), weight) for weight in layer.weights if weight.requires_grad}


def _exchange_decay(optimizer: Optimizer, weight: nn.Parameter, wanted: Tensor, group: dict[str, Any]) -> None:
    """Undo beforehand what the step will do for ``weight_decay``, and do what is wanted instead."""
    assert weight.grad is not None
    rate = float(group["weight_decay"])
    if isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False):
        shrink = 1 - float(group["lr"]) * rate
        weight.sub_(wanted, alpha=float(group["lr"]) * rate).div_(shrink)
    else:
        sign = -1 if group.get("maximize", False) else 1
        weight.grad.add_(wanted - weight, alpha=sign * rate)

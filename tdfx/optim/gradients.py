"""Carries gradients that were computed but not applied yet, as in the middle of gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tdfx.layers.placement import full_precise, shard_like
from tdfx.optim.surgery import Exchange


@torch.no_grad()
def carry_gradients(exchanges: Iterable[Exchange]) -> None:
    """Give new parameters gradients computed from those of the parameters that they replace, which keep their own.

    To factors they are carried by the chain rule, so gradients accumulated before and after the rewrite add up to what the
    factors would have accumulated from the start. To a dense weight, the gradient of least norm is taken that the chain rule
    carries to the factors' gradients.
    """
    for exchange in exchanges:
        if any(parameter.grad is not None for parameter in exchange.old):
            gradients = exchange.carrier.first(tuple(map(_gradient, exchange.old)))
            for parameter, gradient in zip(exchange.new, gradients, strict=True):
                if parameter.requires_grad:
                    placed = shard_like(gradient.to(parameter.dtype), parameter)
                    parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(placed)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter in the working dtype; zeros if it has none while others of the site have one."""
    if parameter.grad is None:
        return torch.zeros_like(full_precise(parameter))
    return full_precise(parameter.grad)

"""Carrying gradients that wait for a step, as in the middle of gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tdfx.layers.placement import full, shard_like
from tdfx.optim.surgery import Exchange
from tdfx.ranks.spectrum import working_dtype


@torch.no_grad()
def carry_gradients(exchanges: Iterable[Exchange]) -> None:
    """Give new parameters the gradients of those whose place they take; what leaves keeps its own.

    To factors this is the chain rule, so what is accumulated before and after adds up to what the factors would have had
    from the start. To a dense weight it is the least gradient from which the factors' come.
    """
    for exchange in exchanges:
        if any(parameter.grad is not None for parameter in exchange.old):
            carried = exchange.carrier.first(tuple(map(_gradient, exchange.old)))
            for parameter, gradient in zip(exchange.new, carried, strict=True):
                if parameter.requires_grad:
                    placed = shard_like(gradient.to(parameter.dtype), parameter)
                    parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(placed)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return a gradient in the dtype in which it is carried, zeros where there is none beside others that are there."""
    value = full(parameter if parameter.grad is None else parameter.grad)
    wide = value.to(working_dtype(value))
    return torch.zeros_like(wide) if parameter.grad is None else wide

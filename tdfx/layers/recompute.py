"""Recomputation with the weights of the forward pass, whatever the layer holds when the backward pass comes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tdfx.factors.recomputed import recomputed


def recompute_chain(layer: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``compute(x)`` and keep only ``x`` for the backward pass.

    Args:
        layer: The module whose parameters ``compute`` reads; ``functional_call`` may exchange them for the forward pass.
        compute: Computes the output.
        x: The input.
    """
    if torch.compiler.is_compiling():  # the compiler records parameters as inputs of its graph
        return recomputed(compute, x)
    weights = dict(layer.named_parameters())

    def run(x: Tensor) -> Tensor:
        present = dict(layer.named_parameters())
        if all(present.get(name) is weight for name, weight in weights.items()):
            return compute(x)
        values: dict[str, Tensor] = {f"layer.{name}": weight for name, weight in weights.items()}
        out: Tensor = functional_call(_Caller(layer, compute), values, (x,))
        return out

    return recomputed(run, x)


class _Caller(nn.Module):
    """Calls a function as a module that holds the layer whose parameters the function reads."""

    def __init__(self, layer: nn.Module, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        # Not registered where it is a module: functional_call would exchange its parameters twice, and not put them back.
        self.__dict__["compute"] = compute

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.__dict__["compute"](x)
        return out

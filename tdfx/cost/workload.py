"""The part of a training step that is timed for a chain of operations: forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdfx.cost.count import Flow, count_chain
from tdfx.cost.setting import computing_in
from tdfx.devices import cache_bytes
from tdfx.factors.functions import apply_factor, apply_operation
from tdfx.factors.operation import Operation
from tdfx.factors.recomputed import recomputed

_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
_COLD = 2**26
"""Bytes of activations between a forward and its backward: as in a model, they have left the caches before they are read."""
_MOST_COPIES = 4
"""Inputs at most: a chain so small that it would need more costs little but its start-up."""
_MUCH_WORK = 2e8
"""Forward operations of a run on a CPU above which no input is added: measured from there on, one input gives the time of
four within a few percent, since arithmetic decides it, or the activations of one step drive one another out."""


class Workload:
    """A chain of operations on random values; ``run`` computes forward and backward of some training steps.

    The forwards of all steps come first, then the backwards, last step first.
    """

    def __init__(self, chain: Sequence[Operation], flow: Flow, shares: Sequence[Workload] = ()) -> None:
        """Draw the values, but share inputs and output gradient with an earlier workload of the same shapes."""
        self.chain = tuple(chain)
        self.recomputes = flow.recomputes
        self.setting = setting = flow.setting
        self.weights = [self._random(operation.weight_shape, setting.dtype).requires_grad_() for operation in chain]
        shape = (flow.samples, chain[0].in_channels, *(flow.size if chain[0].dims else ()))
        inputs = [work.inputs for work in shares if work.inputs[0].shape == shape and work.setting == setting]
        self.inputs: list[Tensor] = inputs[0] if inputs else [self._input(shape)]
        self.steps = self._copies(math.prod(shape), flow)
        """How many training steps one run computes."""
        self.inputs += [self._copy(self.inputs[0]) for _ in range(self.steps - len(self.inputs))]
        shape = (flow.samples, chain[-1].out_channels, *_out_size(chain, flow.size))
        gradients = [work.gradient for work in shares if work.gradient.shape == shape and work.setting == setting]
        self.gradient: Tensor = gradients[0] if gradients else self._random_gradient()

    def run(self) -> None:
        """Compute the outputs and every gradient, and discard them."""
        with torch.enable_grad():
            outs = [self._forward(x) for x in self.inputs[: self.steps]]
        for x in reversed(self.inputs[: self.steps]):
            torch.autograd.grad(outs.pop(), self.wanted(x), self.gradient)

    def wanted(self, x: Tensor) -> list[Tensor]:
        """Return the tensors whose gradient is computed, in the step with this input."""
        return [x, *self.weights] if self.setting.wants_input_gradient else self.weights

    def _copies(self, values: int, flow: Flow) -> int:
        """Return how many inputs of so many values are needed for activations to be cold when they are read."""
        counts = list(count_chain(self.chain, flow))
        values += sum(count.written for count in counts)
        cold = max(_COLD, 2 * cache_bytes(self.setting.device))
        copies = cold / (values * self.setting.computes_in.itemsize)
        if self.setting.device_type == "cpu":
            copies = min(copies, _MUCH_WORK / sum(count.flops for count in counts))
        return min(_MOST_COPIES if cold == _COLD else 4 * _MOST_COPIES, max(1, math.ceil(copies)))

    def _input(self, shape: Sequence[int]) -> Tensor:
        return self._random(shape, self.setting.computes_in).requires_grad_(self.setting.wants_input_gradient)

    def _copy(self, x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(self.setting.wants_input_gradient)

    @torch.no_grad()
    def _random_gradient(self) -> Tensor:
        out = self._forward(self.inputs[0])
        return torch.empty_like(out).copy_(self._random(out.shape, out.dtype))

    def _forward(self, x: Tensor) -> Tensor:
        with computing_in(self.setting.autocast, self.setting.device_type):
            return recomputed(self._apply, x) if self.recomputes else self._apply(x)

    def _apply(self, x: Tensor) -> Tensor:
        apply = apply_factor if len(self.chain) > 1 else apply_operation
        for operation, weight in zip(self.chain, self.weights, strict=True):
            x = apply(operation, x, weight)
        return x

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # A separate generator leaves the random numbers of the user's run alone.
        device = self.setting.device
        generator = torch.Generator(device).manual_seed(0)
        values = torch.randn(tuple(shape), generator=generator, device=device).to(dtype)
        layout = _CHANNELS_LAST.get(len(shape) - 2) if self.setting.channels_last else None
        return values.contiguous(memory_format=layout) if layout is not None else values


def _out_size(chain: Sequence[Operation], size: tuple[int, ...]) -> tuple[int, ...]:
    for operation in chain:
        size = operation.out_size(size)
    return size

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

_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
_COLD = 2**26
"""Bytes of activations between a forward and its backward: as in a model, they have left the caches before they are read."""
_MOST_COPIES = 4
"""Inputs at most: a chain so small that it would need more costs little but its start-up."""


class Workload:
    """A chain of operations on random values; ``run`` computes forward and backward of some training steps.

    The forwards of all steps come first, then the backwards, last step first.
    """

    def __init__(self, chain: Sequence[Operation], flow: Flow, shares: Sequence[Workload] = ()) -> None:
        """Draw the values, but share inputs and output gradient with an earlier workload of the same shapes."""
        self.chain = tuple(chain)
        self.setting = setting = flow.setting
        self.weights = [self._random(operation.weight_shape, setting.dtype).requires_grad_() for operation in chain]
        shape = (flow.samples, chain[0].in_channels, *(flow.size if chain[0].dims else ()))
        inputs = [work.inputs for work in shares if work.inputs[0].shape == shape and work.setting == setting]
        self.inputs: list[Tensor] = inputs[0] if inputs else self._inputs(shape, flow)
        with torch.no_grad():
            out = self._forward(self.inputs[0])
        gradients = [work.gradient for work in shares]
        gradients = [gradient for gradient in gradients if (gradient.shape, gradient.dtype) == (out.shape, out.dtype)]
        self.gradient: Tensor = (
            gradients[0] if gradients else torch.empty_like(out).copy_(self._random(out.shape, out.dtype))
        )

    @property
    def steps(self) -> int:
        """How many training steps one run computes."""
        return len(self.inputs)

    def run(self) -> None:
        """Compute the outputs and every gradient, and discard them."""
        with torch.enable_grad():
            outs = [self._forward(x) for x in self.inputs]
        for x in reversed(self.inputs):
            torch.autograd.grad(outs.pop(), self.wanted(x), self.gradient)

    def wanted(self, x: Tensor) -> list[Tensor]:
        """Return the tensors whose gradient is computed, in the step with this input."""
        return [x, *self.weights] if self.setting.wants_input_gradient else self.weights

    def _inputs(self, shape: Sequence[int], flow: Flow) -> list[Tensor]:
        dtype = self.setting.computes_in
        values = math.prod(shape) + sum(step.written for step in count_chain(self.chain, flow))
        cold = max(_COLD, 2 * cache_bytes(self.setting.device))
        copies = min(_MOST_COPIES if cold == _COLD else 4 * _MOST_COPIES, max(1, cold // (values * dtype.itemsize)))
        first = self._random(shape, dtype)
        inputs = [first, *(first.clone() for _ in range(copies - 1))]
        return [x.requires_grad_(self.setting.wants_input_gradient) for x in inputs]

    def _forward(self, x: Tensor) -> Tensor:
        apply = apply_factor if len(self.chain) > 1 else apply_operation
        with computing_in(self.setting.autocast, self.setting.device_type):
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

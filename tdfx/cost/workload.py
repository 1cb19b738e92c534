"""The training step of one chain of operations, as it is timed: forward, backward, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdfx.cost.count import Flow, count_chain
from tdfx.cost.setting import computing_in
from tdfx.factors.functions import apply_operation
from tdfx.factors.operation import Operation

_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


_COLD = 2**26
"""Bytes of activations between a forward and its backward, more than caches hold: as in a model, where what was kept for the
backward has long left the caches when that comes."""
_MOST_COPIES = 4
"""Inputs at most: what is so small that more would be needed costs next to nothing but its start-up."""


class Workload:
    """A chain of operations on random values, whose ``run`` is some training steps of it without the optimizer's.

    The forwards of all steps come first, then the backwards, last step first.
    """

    def __init__(self, chain: Sequence[Operation], flow: Flow, shares: Sequence[Workload] = ()) -> None:
        """Draw the values; input and output gradient are those of an earlier workload where one has the same shapes."""
        setting = flow.setting
        self.chain = tuple(chain)
        self.setting = setting
        self.weights = [self._random(one.weight_shape, setting.dtype, setting.device) for one in chain]
        for weight in self.weights:
            weight.requires_grad_()
        first = chain[0]
        shape = (flow.samples, first.in_channels, *flow.size) if first.dims else (flow.samples, first.in_channels)
        same = [one.inputs for one in shares if one.inputs[0].shape == shape and one.setting == setting]
        self.inputs: list[Tensor] = same[0] if same else self._inputs(shape, flow)
        with torch.no_grad():
            out = self._forward(self.inputs[0])
        alike = [one.gradient for one in shares if one.gradient.shape == out.shape and one.gradient.dtype == out.dtype]
        self.gradient: Tensor = alike[0] if alike else torch.ones_like(out)

    @property
    def steps(self) -> int:
        """How many training steps one run is."""
        return len(self.inputs)

    def run(self) -> None:
        """Compute the outputs and every gradient, and let go of them."""
        with torch.enable_grad():
            outs = [self._forward(x) for x in self.inputs]
        for x in reversed(self.inputs):
            torch.autograd.grad(outs.pop(), self.wanted(x), self.gradient)

    def wanted(self, x: Tensor) -> list[Tensor]:
        """Return what the gradient is computed for, in the step with this input."""
        return [x, *self.weights] if self.setting.wants_input_gradient else self.weights

    def _inputs(self, shape: Sequence[int], flow: Flow) -> list[Tensor]:
        setting = self.setting
        values = math.prod(shape) + sum(step.written for step in count_chain(self.chain, flow))
        copies = min(_MOST_COPIES, max(1, _COLD // (values * setting.computes_in.itemsize)))
        first = self._random(shape, setting.computes_in, setting.device)
        made = [first, *(first.clone() for _ in range(copies - 1))]
        return [one.requires_grad_(setting.wants_input_gradient) for one in made]

    def _forward(self, x: Tensor) -> Tensor:
        with computing_in(self.setting.autocast, self.setting.device_type):
            for operation, weight in zip(self.chain, self.weights, strict=True):
                x = apply_operation(operation, x, weight)
        return x

    def _random(self, shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
        # Drawn by a generator of its own: the stream of the user's run is left alone.
        generator = torch.Generator(device).manual_seed(0)
        made = torch.randn(tuple(shape), generator=generator, device=device).to(dtype)
        layout = _CHANNELS_LAST.get(len(shape) - 2) if self.setting.channels_last else None
        return made.contiguous(memory_format=layout) if layout is not None else made

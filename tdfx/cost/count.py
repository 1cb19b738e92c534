"""Count the parameters, floating-point operations, activations and training memory of a chain of operations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tdfx.cost.setting import Setting
from tdfx.factors.operation import Operation

_COPIES = 4
"""Numbers kept for each weight value: the value, its gradient, and two moments, as Adam keeps them."""


@dataclass(frozen=True, slots=True)
class Flow:
    """What flows into a site in one call."""

    samples: int
    """Positions that are not spatial: the batch, and for a linear map every leading dimension."""
    size: tuple[int, ...] = ()
    """Spatial size of the input, in positions; () for a linear map."""
    operation: Operation | None = None
    """What this call computes, where its stride or padding differs from the site's other calls."""
    setting: Setting = field(default=Setting(), repr=False)
    """Device, dtype and the like, in which the call is computed."""


@dataclass(frozen=True, slots=True)
class StepCount:
    """The forward work of one operation."""

    flops: int
    """Floating-point operations; a multiplication and an addition count as two."""
    values: int
    """Numbers read and written once: input, output and weight."""
    written: int
    """Numbers in the output."""


def count_chain(chain: Sequence[Operation], flow: Flow) -> Iterator[StepCount]:
    """Yield the forward work of each operation of a chain, the first of which receives ``flow``."""
    size = flow.size
    for operation in chain:
        after = operation.out_size(size)
        read = flow.samples * operation.in_channels * math.prod(size)
        written = flow.samples * operation.out_channels * math.prod(after)
        # A transposed convolution applies its kernel to each value that it reads, others for each value that they write.
        flops_per_value = 2 * math.prod(operation.weight_shape[1:])
        work = (read if operation.transposed else written) * flops_per_value
        yield StepCount(flops=work, values=read + written + operation.parameters, written=written)
        size = after


def flops(chain: Sequence[Operation], flow: Flow) -> int:
    """Return the floating-point operations of one forward pass through a chain.

    >>> dense = Operation.pointwise(64, 64, 2)
    >>> flops([dense], Flow(8, (10, 10)))
    6553600
    """
    return sum(step.flops for step in count_chain(chain, flow))


def intermediate_values(chain: Sequence[Operation], flow: Flow) -> int:
    """Return how many activations between the operations a training step keeps until the backward pass.

    >>> half = [Operation.pointwise(64, 32, 2), Operation.pointwise(32, 64, 2)]
    >>> intermediate_values(half, Flow(8, (10, 10))), intermediate_values(half[:1], Flow(8, (10, 10)))
    (25600, 0)
    """
    return sum(step.written for step in list(count_chain(chain, flow))[:-1])


def parameters(chain: Sequence[Operation]) -> int:
    """Return the weight values of a chain, biases not counted."""
    return sum(operation.parameters for operation in chain)


def training_bytes(chain: Sequence[Operation], flows: Sequence[Flow]) -> int:
    """Return the bytes that a chain adds to a training step.

    These are the weights, gradients and two moments, in the weight's dtype, and for each call the activations between the
    operations, in the dtype of the products. Input and output are the same for every chain in a site's place: not counted.

    >>> dense, half = Operation.pointwise(64, 64, 2), [Operation.pointwise(64, 16, 2), Operation.pointwise(16, 64, 2)]
    >>> training_bytes([dense], [Flow(8, (10, 10))]), training_bytes(half, [Flow(8, (10, 10))])
    (65536, 83968)
    """
    width = flows[0].setting.dtype.itemsize if flows else 4
    activations = sum(intermediate_values(chain, flow) * flow.setting.computes_in.itemsize for flow in flows)
    return _COPIES * width * parameters(chain) + activations

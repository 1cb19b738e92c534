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
    recomputes: bool = field(default=False, repr=False)
    """True if the backward pass computes what flows between the operations again, and nothing of it is kept."""


@dataclass(frozen=True, slots=True)
class StepCount:
    """The forward work of one operation."""

    flops: int
    """Floating-point operations; a multiplication and an addition count as two."""
    values: int
    """Numbers read and written once: input, output and weight."""
    written: int
    """Numbers in the output."""
    again: bool = False
    """True if the backward pass computes the output again."""


def count_chain(chain: Sequence[Operation], flow: Flow) -> Iterator[StepCount]:
    """Yield the forward work of each operation of a chain, the first of which receives ``flow``."""
    size = flow.size
    for index, operation in enumerate(chain):
        after = operation.out_size(size)
        read = flow.samples * operation.in_channels * math.prod(size)
        written = flow.samples * operation.out_channels * math.prod(after)
        # A transposed convolution applies its kernel to each value that it reads, others for each value that they write.
        flops_per_value = 2 * math.prod(operation.weight_shape[1:])
        work = (read if operation.transposed else written) * flops_per_value
        again = flow.recomputes and index < len(chain) - 1
        yield StepCount(flops=work, values=read + written + operation.parameters, written=written, again=again)
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
    operations, in the dtype of the products, unless it recomputes them. Input and output are the same for every chain in a
    site's place: not counted.

    >>> dense, half = Operation.pointwise(64, 64, 2), [Operation.pointwise(64, 16, 2), Operation.pointwise(16, 64, 2)]
    >>> training_bytes([dense], [Flow(8, (10, 10))]), training_bytes(half, [Flow(8, (10, 10))])
    (65536, 83968)
    """
    width = flows[0].setting.dtype.itemsize if flows else 4
    return _COPIES * width * parameters(chain) + sum(_intermediate_bytes(chain, flow) for flow in flows)


def kept_bytes(chain: Sequence[Operation], flows: Sequence[Flow]) -> int:
    """Return the bytes of activations that calls of a chain keep for the backward pass: inputs, and what flows between.

    >>> half, flow = [Operation.pointwise(64, 16, 2), Operation.pointwise(16, 64, 2)], Flow(8, (10, 10))
    >>> kept_bytes(half[:1], [flow]), kept_bytes(half, [flow]), kept_bytes(half, [Flow(8, (10, 10), recomputes=True)])
    (204800, 256000, 204800)
    """
    return sum(_input_bytes(chain[0], flow) + _intermediate_bytes(chain, flow) for flow in flows)


def _input_bytes(operation: Operation, flow: Flow) -> int:
    return flow.samples * operation.in_channels * math.prod(flow.size) * flow.setting.computes_in.itemsize


def _intermediate_bytes(chain: Sequence[Operation], flow: Flow) -> int:
    return 0 if flow.recomputes else intermediate_values(chain, flow) * flow.setting.computes_in.itemsize

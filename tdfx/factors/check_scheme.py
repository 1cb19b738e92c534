"""Check the laws of a scheme on a few small layers, before it is registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tdfx.errors import PolicyError, first_line
from tdfx.factors.algebra import linearize
from tdfx.factors.functions import apply_operation
from tdfx.factors.metric import Metric
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Factors, Scheme
from tdfx.ranks.spectrum import Spectrum

_CLOSE = 1e-6
"""Largest relative difference, in float64, that counts as rounding."""
_operation = partial(Operation, in_channels=6, out_channels=4)
_LAYERS: dict[str, Operation] = {
    "a linear map": _operation(),
    "a 1×1 convolution": _operation(kernel=(1, 1), stride=(2, 2)),
    "a 3×3 convolution": _operation(kernel=(3, 3), stride=(2, 1), padding=(1, 1)),
    "a 3×2 convolution in groups": _operation(kernel=(3, 2), dilation=(2, 1), groups=2),
    "a convolution in one dimension": _operation(kernel=(3,), padding="same"),
    "a convolution in three dimensions": _operation(kernel=(2, 3, 2)),
    "a depthwise convolution": Operation(in_channels=4, out_channels=4, kernel=(3, 3), groups=4),
    "a transposed convolution": _operation(
        kernel=(3, 3), stride=(2, 2), padding=(1, 1), transposed=True, output_padding=(1, 1)
    ),
}


def check_scheme(scheme: Scheme) -> None:
    """Raise PolicyError unless a scheme keeps its laws on every small layer that it fits: what its methods promise.

    Raises:
        PolicyError: It breaks a law, or fits no layer; the message names the law and the layer.
    """
    fitting = {name: operation for name, operation in _LAYERS.items() if scheme.fits(operation)}
    if not fitting:
        raise PolicyError(
            f"The scheme {scheme.name!r} fits none of {', '.join(_LAYERS)}. Let fits() return True for some."
        )
    for name, operation in fitting.items():
        try:
            broken = next(filter(None, _broken_laws(scheme, operation)), None)
        except Exception as error:  # a user's scheme can raise anything
            place = inspect.trace()[-1]
            broken = f"{type(error).__name__} in {place.function}(), line {place.lineno}: {first_line(error)}"
        if broken is not None:
            raise PolicyError(
                f"The scheme {scheme.name!r} cannot be used: for {name}, {operation}, {broken}. Correct it."
            )


def _broken_laws(scheme: Scheme, operation: Operation) -> Iterator[str | None]:
    """Yield a sentence for each law that does not hold, and None for each that does; later laws need the earlier ones."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float64, generator=generator)

    weight, other = random(operation.weight_shape), random(operation.weight_shape)
    full, spectra = tuple(scheme.full_ranks(operation)), scheme.spectra(operation, weight)
    yield _wrong_spectra(full, spectra)
    chain, factors = scheme.chain(operation, full), scheme.split(operation, weight, full, spectra)
    yield _wrong_chain(operation, chain, factors)
    yield _unequal(
        "join() does not give back what split() was given, at full rank", scheme.join(operation, factors), weight
    )
    low = tuple(max(1, rank // 2) for rank in full)
    lossy = scheme.split(operation, weight, low, spectra)
    chain, joined = scheme.chain(operation, low), scheme.join(operation, lossy)
    yield _wrong_chain(operation, chain, lossy)
    x = random((2, operation.in_channels, *(7,) * operation.dims))
    through = x
    for step, factor in zip(chain, lossy, strict=True):
        through = apply_operation(step, through, factor)
    yield _unequal(
        "the factors of chain() do not compute what join() gives", through, apply_operation(operation, x, joined)
    )
    lost, error = float((joined - weight).norm() / weight.norm()), scheme.error(operation, weight, low, spectra)
    yield (
        None if abs(lost - error) <= _CLOSE else f"error() is {error:.4g} at ranks {low}, and split() loses {lost:.4g}"
    )
    metric = _metric(operation, random, mixes_outputs=scheme.mixes_outputs)
    moved = metric.apply(operation, weight)
    split = scheme.split(operation, moved, full, scheme.spectra(operation, moved))
    back = scheme.join(operation, metric.take_back(scheme.chain(operation, full), split))
    yield _unequal("the outer factors cannot take the metric of the loss (see mixes_outputs)", back, weight)
    near = linearize(lambda *given: scheme.join(operation, given), lossy)
    gradients = near.pull(other)
    again = near.pull(scheme.project(operation, lossy, gradients))
    for pair in zip(again, gradients, strict=True):
        yield _unequal("project() gives a gradient with other gradients of the factors", *pair)
    refitted = scheme.join(operation, scheme.refit(operation, factors, other))
    yield _unequal("refit() at full rank does not give the weight", refitted, other)


def _metric(operation: Operation, random: Callable[[Sequence[int]], Tensor], *, mixes_outputs: bool) -> Metric:
    """Return a metric of random, well-conditioned roots."""
    sizes = operation.in_channels // operation.groups, operation.out_channels // operation.groups
    roots = (
        random((operation.groups, size, size)).tril(-1) / 4 + torch.eye(size, dtype=torch.float64) for size in sizes
    )
    metric = Metric(*roots)
    return metric if mixes_outputs else metric.by_channel()


def _wrong_spectra(full: Sequence[int], spectra: Sequence[Spectrum]) -> str | None:
    """Return what is wrong with full ranks and spectra: there is one of each for each rank."""
    if not full or any(not isinstance(rank, int) or rank < 1 for rank in full):
        return f"full_ranks() gives {full}, which are not whole numbers of at least 1"
    if len(spectra) != len(full) or not all(isinstance(each, Spectrum) for each in spectra):
        return f"full_ranks() gives {len(full)} ranks, and spectra() {len(spectra)} objects, which must be as many Spectrum"
    return None


def _wrong_chain(operation: Operation, chain: Sequence[Operation], factors: Factors) -> str | None:
    """Return what is wrong with a chain of at least two operations and the weights of its factors."""
    ends = [operation.in_channels, *(step.out_channels for step in chain)]
    starts = [*(step.in_channels for step in chain), operation.out_channels]
    if len(chain) < 2 or starts != ends:
        return f"chain() takes the channels {starts[:-1]} and gives {ends[1:]}: each operation must take what the last gave"
    shapes, expected = [tuple(factor.shape) for factor in factors], [step.weight_shape for step in chain]
    return None if shapes == expected else f"split() gives factors of shapes {shapes}, and chain() wants {expected}"


def _unequal(text: str, value: Tensor, expected: Tensor) -> str | None:
    """Return a sentence if two tensors differ by more than rounding."""
    if value.shape != expected.shape:
        return f"{text}: the shape is {tuple(value.shape)}, and should be {tuple(expected.shape)}"
    difference = float((value - expected).norm() / expected.norm())
    return None if difference <= _CLOSE else f"{text}: the relative difference is {difference:.2g}"

"""Canonical polyadic decomposition: pointwise, one depthwise convolution along each dimension, pointwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tdfx.factors.algebra import least_norm, root_scale
from tdfx.factors.alternating import Modes, fit, refit, total
from tdfx.factors.layout import from_groups, grouped_shape, to_groups
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Scheme
from tdfx.ranks.spectrum import Spectrum, singular_side


@dataclass(frozen=True, slots=True)
class SliceSpectrum(Spectrum):
    """The singular values of all slices of a weight, one slice for each tap; the basis is (g, taps, d, r)."""

    fitted: dict[int, Modes] = field(default_factory=dict, compare=False)
    """Rank -> the components found at it, because finding them takes long and both error and split want them."""

    def cut(self, rank: int) -> SliceSpectrum:
        """Return the spectrum with the components of this rank, where they were found, in place of the basis."""
        if rank not in self.fitted:
            return replace(self, fitted={})
        return replace(self, basis=self.values.new_empty(0), fitted={rank: self.fitted[rank]})

    def without_basis(self) -> SliceSpectrum:
        """Return the spectrum with its values alone."""
        return replace(self, basis=self.values.new_empty(0), fitted={})


class Cp(Scheme):
    """``w_oik = sum over r of last_or * along_kr * ... * first_ri``, in each group, by alternating least squares.

    The rank of a tensor has no spectrum. What the rank rule reads is that of a decomposition anybody can write down: the
    singular value decomposition of each slice, one tap of the kernel at a time, whose components have a kernel of that one
    tap. Keeping the largest R of them all is a canonical decomposition of rank R, its loss is the norm of the values cut,
    and with all of them it is exact; so the full rank is taps · min(o, i), and an error read from the spectrum is a bound.
    The iteration starts there, never gets worse, and stops before components of opposite sign grow without limit, which is
    how a best approximation of a given rank can fail to exist (de Silva and Lim, SIAM J. Matrix Anal. Appl. 30, 2008).

    Each kernel dimension with more than one tap is a factor, with its stride, padding and dilation; the others go along
    with the first of them. Source: Lebedev et al., *Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition*, ICLR 2015.
    """

    name = "cp"

    def fits(self, operation: Operation) -> bool:
        """Convolutions with more than one tap, unless they leave every channel to itself."""
        return operation.mixes_taps_and_channels

    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """One rank: the smaller number of channels for each tap."""
        _, o, i, *kernel = grouped_shape(operation)
        return (math.prod(kernel) * min(o, i),)

    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Down to the rank, along each dimension on its own, up to the output."""
        middle = ranks[0] * operation.groups
        along = (operation.along(axes, middle, middle, groups=middle) for axes in _dimensions(operation))
        return (
            operation.along((), operation.in_channels, middle),
            *along,
            operation.along((), middle, operation.out_channels),
        )

    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the singular values of all slices (o, i), the largest first, of all groups together."""
        slices = _slices(operation, weight)
        _, taps, o, i = slices.shape
        gram = slices @ slices.mT if o <= i else slices.mT @ slices
        values, basis = singular_side(gram, min(o, i))
        ordered = values.flatten(1).sort(dim=1, descending=True).values
        return (SliceSpectrum(ordered.square().sum(0).sqrt(), basis, taps * o, taps * i),)

    def split(
        self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]
    ) -> tuple[Tensor, ...]:
        """Return the factors' weights, each with the same share of every component's norm."""
        return _to_factors(operation, _balanced(self._components(operation, weight, ranks, spectra)))

    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Add up the components."""
        w_goik = total(_from_factors(operation, factors))
        return from_groups(operation, w_goik.reshape(grouped_shape(operation)))

    def project(self, operation: Operation, factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Solve for it: no closed form is known."""
        return least_norm(lambda *given: self.join(operation, given), factors, gradients)

    def refit(self, operation: Operation, factors: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Fit the input or the output channels, whichever are more."""
        return _to_factors(operation, refit(to_groups(operation, weight).flatten(3), _from_factors(operation, factors)))

    def error(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        """Return the norm of the difference, relative to the weight's."""
        if ranks == self.full_ranks(operation) or not weight.norm() > 0:
            return 0.0
        w_goik = to_groups(operation, weight)
        joined = total(self._components(operation, weight, ranks, spectra)).reshape(w_goik.shape)
        return float((w_goik - joined).norm() / weight.norm())

    def _components(
        self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]
    ) -> Modes:
        (rank,), (one,) = ranks, spectra
        assert isinstance(one, SliceSpectrum)
        if rank not in one.fitted:
            start = _largest(operation, weight, one, rank)
            exact = (rank,) == self.full_ranks(operation)
            w_goik = to_groups(operation, weight).flatten(3)
            one.fitted[rank] = start if exact else fit(w_goik, start)
        return one.fitted[rank]


def _dimensions(operation: Operation) -> list[tuple[int, ...]]:
    """Return the kernel dimensions of each depthwise factor."""
    long = [axis for axis, taps in enumerate(operation.kernel) if taps > 1]
    short = [axis for axis, taps in enumerate(operation.kernel) if taps == 1]
    return [tuple(sorted([long[0], *short])), *((axis,) for axis in long[1:])]


def _slices(operation: Operation, weight: Tensor) -> Tensor:
    """Return the matrices (g, taps, o, i) of a dense weight."""
    return to_groups(operation, weight).flatten(3).permute(0, 3, 1, 2)


def _largest(operation: Operation, weight: Tensor, spectrum: SliceSpectrum, rank: int) -> Modes:
    """Return the ``rank`` largest components of all slices: (g, o, r), (g, i, r), and (g, k, r) for each long dimension."""
    slices = _slices(operation, weight)
    o, i = slices.shape[2:]
    basis = spectrum.basis
    left, right = (basis, slices.mT @ basis) if o <= i else (slices @ basis, basis)
    norms = (right if o <= i else left).norm(dim=2).flatten(1)
    chosen = norms.argsort(dim=1, descending=True, stable=True)[:, :rank]

    def pick(each: Tensor) -> Tensor:
        columns = each.transpose(1, 2).flatten(2)
        return columns.gather(2, chosen[:, None].expand(-1, columns.shape[1], -1))

    tap = chosen // min(o, i)
    long = [size for size in operation.kernel if size > 1]
    kernels = []
    for index, size in enumerate(long):
        place = tap // math.prod(long[index + 1 :]) % size
        kernels.append(torch.nn.functional.one_hot(place, size).mT.to(weight.dtype))
    return pick(left), pick(right), *kernels


def _balanced(modes: Modes) -> Modes:
    """Give each mode the same norm in every component; one that is zero stays so in its first mode alone."""
    norms = torch.stack([mode.norm(dim=1) for mode in modes])
    size = norms.prod(dim=0)
    share = root_scale(size).square().pow(1 / len(modes))
    least = 1e3 * torch.finfo(size.dtype).eps * size.amax(-1, keepdim=True)
    empty = size <= least
    unit = []
    for mode, norm in zip(modes, norms, strict=True):
        direction = mode / norm.where(norm > 0, 1.0)[:, None]
        unit.append(direction.where(norm[:, None] > 0, mode.shape[1] ** -0.5))
    balanced = [one * share[:, None] for one in unit]
    balanced[0] = torch.where(empty[:, None], unit[0] * size[:, None], balanced[0])
    return tuple(balanced)


def _to_factors(operation: Operation, modes: Modes) -> tuple[Tensor, ...]:
    left, right, *kernels = modes
    rank = left.shape[2]
    first, *along, last = Cp().chain(operation, (rank,))
    return (
        right.mT.reshape(first.weight_shape),
        *(kernel.mT.reshape(step.weight_shape) for kernel, step in zip(kernels, along, strict=True)),
        left.reshape(last.weight_shape),
    )


def _from_factors(operation: Operation, factors: Sequence[Tensor]) -> Modes:
    first, *along, last = factors
    groups, rank = operation.groups, last.shape[1]
    return (
        last.reshape(groups, -1, rank),
        first.reshape(groups, rank, -1).mT,
        *(kernel.reshape(groups, rank, -1).mT for kernel in along),
    )

"""Canonical polyadic decomposition: pointwise, one depthwise convolution along each dimension, pointwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tdfx.factors.algebra import root_scale
from tdfx.factors.alternating import Modes, fit, refit, total
from tdfx.factors.operation import Operation, from_groups, grouped_shape, to_groups
from tdfx.factors.scheme import Factors, Scheme
from tdfx.ranks.spectrum import Spectrum, singular_side


@dataclass(frozen=True, slots=True)
class SliceSpectrum(Spectrum):
    """The singular values of all slices of a weight, one slice for each tap; the basis is (g, taps, d, r)."""

    fitted: dict[int, Modes] = field(default_factory=dict, compare=False)
    """Rank -> the fitted components, because fitting takes long, and both the error and the split need them."""

    def cut(self, rank: int) -> SliceSpectrum:
        """Return the spectrum with the components of this rank, where they were fitted, in place of the basis."""
        if rank not in self.fitted:
            return replace(self, fitted={})
        return replace(self.without_basis(), fitted={rank: self.fitted[rank]})

    def without_basis(self) -> SliceSpectrum:
        """Return the spectrum with its values alone."""
        return replace(self, basis=self.values.new_empty(0), fitted={})


class Cp(Scheme):
    """``w_oik = sum over r of last_or * along_kr * ... * first_ri``, in each group, by alternating least squares.

    The rank of a tensor has no spectrum. The rank rule reads the spectrum of a simple decomposition instead: the singular
    value decomposition of each slice of one tap, whose components have a kernel of that one tap. The largest R components
    of all slices are a canonical decomposition of rank R; its loss is the norm of the values cut, and with all components
    it is exact. So the full rank is taps · min(o, i), and an error read from the spectrum is a bound. The iteration starts
    from these components and never gets worse. It stops before components of opposite sign grow without limit, which happens
    where no best approximation of a given rank exists (de Silva and Lim, SIAM J. Matrix Anal. Appl. 30, 2008).

    Each kernel dimension with more than one tap is a factor, with its stride, padding and dilation; the first of these
    factors also takes the other dimensions. Source: Lebedev et al., *Speeding-up Convolutional Neural Networks Using
    Fine-tuned CP-Decomposition*, ICLR 2015.
    """

    name = "cp"

    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """Return one rank: the taps times the smaller number of channels."""
        _, o, i, *kernel = grouped_shape(operation)
        return (math.prod(kernel) * min(o, i),)

    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Return a map down to the rank, a convolution along each dimension, and a map up to the output."""
        middle = ranks[0] * operation.groups
        return (
            operation.along((), operation.in_channels, middle),
            *(operation.along(axes, middle, middle, groups=middle) for axes in _dimensions(operation)),
            operation.along((), middle, operation.out_channels),
        )

    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the singular values of all slices (o, i) of all groups together, the largest first."""
        slices = _slices(operation, weight)
        _, taps, o, i = slices.shape
        gram = slices @ slices.mT if o <= i else slices.mT @ slices
        values, basis = singular_side(gram, min(o, i))
        ordered = values.flatten(1).sort(dim=1, descending=True).values
        return (SliceSpectrum(ordered.square().sum(0).sqrt().cpu(), basis, taps * o, taps * i),)

    def split(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> Factors:
        """Return the factors' weights; each component has the same norm in all of them."""
        return _to_factors(operation, _balance(self._components(operation, weight, ranks, spectra)))

    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Add up the components."""
        w_goik = total(_from_factors(operation, factors))
        return from_groups(operation, w_goik.reshape(grouped_shape(operation)))

    def refit(self, operation: Operation, factors: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Fit the mode of the input channels or that of the output channels, whichever is longer."""
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
        (rank,), (spectrum,) = ranks, spectra
        assert isinstance(spectrum, SliceSpectrum)
        if rank not in spectrum.fitted:
            start = _largest(operation, weight, spectrum, rank)
            is_exact = (rank,) == self.full_ranks(operation)
            w_goik = to_groups(operation, weight).flatten(3)
            spectrum.fitted[rank] = start if is_exact else fit(w_goik, start)
        return spectrum.fitted[rank]


def _dimensions(operation: Operation) -> list[tuple[int, ...]]:
    """Return the kernel dimensions of each depthwise factor."""
    others = [axis for axis, taps in enumerate(operation.kernel) if taps > 1][1:]
    return [tuple(axis for axis in range(operation.dims) if axis not in others), *((axis,) for axis in others)]


def _slices(operation: Operation, weight: Tensor) -> Tensor:
    """Return the matrices (g, taps, o, i) of a dense weight."""
    return to_groups(operation, weight).flatten(3).permute(0, 3, 1, 2)


def _largest(operation: Operation, weight: Tensor, spectrum: SliceSpectrum, rank: int) -> Modes:
    """Return the largest components of all slices: (g, o, r), (g, i, r), and (g, k, r) for each dimension with taps."""
    slices = _slices(operation, weight)
    o, i = slices.shape[2:]
    basis = spectrum.basis
    left, right = (basis, slices.mT @ basis) if o <= i else (slices @ basis, basis)
    norms = (right if o <= i else left).norm(dim=2).flatten(1)
    chosen = norms.argsort(dim=1, descending=True, stable=True)[:, :rank]

    def pick(vectors: Tensor) -> Tensor:
        columns = vectors.transpose(1, 2).flatten(2)
        return columns.gather(2, chosen[:, None].expand(-1, columns.shape[1], -1))

    taps = torch.unravel_index(chosen // min(o, i), operation.kernel)
    kernels = [
        torch.nn.functional.one_hot(tap, size).mT.to(weight.dtype)
        for tap, size in zip(taps, operation.kernel, strict=True)
        if size > 1
    ]
    return pick(left), pick(right), *kernels


def _balance(modes: Modes) -> Modes:
    """Give all modes of a component the same norm; a component that is zero is zero in its first mode only."""
    norms = torch.stack([mode.norm(dim=1, keepdim=True) for mode in modes])
    size = norms.prod(dim=0)
    share = root_scale(size.squeeze(1)).square().pow(1 / len(modes))[:, None]
    is_zero = size <= 1e3 * torch.finfo(size.dtype).eps * size.amax(-1, keepdim=True)
    units = [
        (mode / norm.where(norm > 0, 1.0)).where(norm > 0, mode.shape[1] ** -0.5)
        for mode, norm in zip(modes, norms, strict=True)
    ]
    first, *others = (unit * share for unit in units)
    return first.where(~is_zero, units[0] * size), *others


def _to_factors(operation: Operation, modes: Modes) -> tuple[Tensor, ...]:
    left, *others = modes
    *chain, last = Cp().chain(operation, left.shape[2:])
    factors = [mode.mT.reshape(step.weight_shape) for mode, step in zip(others, chain, strict=True)]
    return *factors, left.reshape(last.weight_shape)


def _from_factors(operation: Operation, factors: Sequence[Tensor]) -> Modes:
    first, *along, last = factors
    groups, rank = operation.groups, last.shape[1]
    return last.reshape(groups, -1, rank), *(factor.reshape(groups, rank, -1).mT for factor in (first, *along))

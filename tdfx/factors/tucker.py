"""Tucker decomposition over one or both channel modes: a full kernel, and pointwise convolutions before or after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdfx.factors.algebra import pseudo_inverse, root_scale
from tdfx.factors.operation import Operation, from_groups, grouped_shape, to_groups
from tdfx.factors.scheme import Factors, Lowering, Scheme
from tdfx.factors.tensorly_calls import iterate_tucker
from tdfx.factors.two_factors import TwoFactors
from tdfx.ranks.spectrum import Spectrum, spectrum


class Tucker2(Scheme):
    """``w_oik = last_op · core_pqk · first_qi`` in each group, by truncated higher-order SVD; ranks are (output p, input q).

    The core has the kernel, its stride, padding and dilation. The first factor has no bias, so that padding its output is
    the same as padding the input of the dense convolution, in every padding mode.

    Source: Kim et al., *Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications*,
    ICLR 2016; De Lathauwer, De Moor, Vandewalle, *A Multilinear Singular Value Decomposition*, SIAM 2000. The error is at
    most sqrt(2) times the least possible at these ranks; ``tucker2:refine=3`` lowers it by three rounds of iteration.
    """

    options = ("refine",)
    in_float32 = True

    def __init__(self, refine: int = 0) -> None:
        self.refine = refine
        """Rounds of higher-order orthogonal iteration after the truncated HOSVD; each can only lower the error."""
        self.name = f"tucker2:refine={refine}" if refine else "tucker2"

    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """Return the full ranks of the output and of the input unfolding of each group."""
        _, o, i, *kernel = grouped_shape(operation)
        taps = math.prod(kernel)
        return min(o, i * taps), min(i, o * taps)

    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Return a map down to the input rank, the kernel between the ranks, and a map up to the output."""
        p, q = (rank * operation.groups for rank in ranks)
        return (
            operation.along((), operation.in_channels, q),
            operation.along(range(operation.dims), q, p),
            operation.along((), p, operation.out_channels),
        )

    def partial(self, ranks: Sequence[int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the schemes that cut the outputs or the inputs alone."""
        p, q = ranks
        return ("tucker1_out", (p,)), ("tucker1_in", (q,))

    def partial_spectra(self, spectra: Sequence[Spectrum]) -> dict[str, tuple[Spectrum, ...]]:
        """Return the same spectra in the orientation of each scheme, where they are those of the shorter side."""
        outputs, inputs = spectra
        turned = replace(inputs, rows=inputs.cols, cols=inputs.rows)
        partial = ("tucker1_out", outputs, outputs), ("tucker1_in", inputs, turned)
        return {name: (spectrum,) for name, side, spectrum in partial if side.rows < side.cols}

    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the spectra of the unfoldings (o, i·k) and (i, o·k), each from its channel side."""
        return _spectra(to_groups(operation, weight))

    def split(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> Factors:
        """Return ``first`` (q, i, 1...), ``core`` (p, q, k...) and ``last`` (o, p, 1...), for one group.

        Each outer factor takes the square root of its mode's spectrum from the core.
        """
        return self._balance(operation, *self._bases(to_groups(operation, weight), ranks, spectra))

    def _balance(self, operation: Operation, core: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        scale_p = root_scale(core.flatten(2).norm(dim=2))
        scale_q = root_scale(core.transpose(1, 2).flatten(2).norm(dim=2))
        core = _outer_product(torch.diag_embed(1 / scale_p), core, torch.diag_embed(1 / scale_q))
        return _to_factors(operation, core, left * scale_p[:, None], right * scale_q[:, None])

    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Multiply the core by both outer factors."""
        core, left, right = _from_factors(operation, factors)
        return from_groups(operation, _outer_product(left, core, right.mT))

    def project(self, operation: Operation, factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Add three orthogonal parts: inside both bases, outside the output basis, outside the input basis.

        Source: Koch and Lubich, *Dynamical Tensor Approximation*, SIAM J. Matrix Anal. Appl. 31 (2010).
        """
        core, left, right = _from_factors(operation, factors)
        by_core, by_left, by_right = _from_factors(operation, gradients)
        inverse_left, inverse_right = pseudo_inverse(left), pseudo_inverse(right)
        # Each part is as large as the dense weight, so that they are added one at a time.
        parts = _outer_product(inverse_left.mT, by_core, inverse_right)
        parts += _outside(left, inverse_left, by_left, torch.einsum("gpq...,giq->gpi...", core, right))
        in_part = _outside(right, inverse_right, by_right, torch.einsum("gpq...,gop->gqo...", core, left))
        parts += in_part.transpose(1, 2)
        return from_groups(operation, parts)

    def refit(self, operation: Operation, factors: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Fit the core."""
        _, left, right = _from_factors(operation, factors)
        w_goik = to_groups(operation, weight)
        core = _outer_product(pseudo_inverse(left), w_goik, pseudo_inverse(right).mT)
        return _to_factors(operation, core, left, right)

    def error(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        """Return the norm of what the projection on both bases loses, relative to the weight's."""
        return self._loss(to_groups(operation, weight), ranks, spectra)

    def errors(
        self, operation: Operation, weight: Tensor, grid: Sequence[Sequence[int]], spectra: Sequence[Spectrum]
    ) -> list[float]:
        """Return the error at each of several ranks, all of them from the squares of one core in the whole bases."""
        if self.refine or not grid:
            return super().errors(operation, weight, grid, spectra)
        w_goik = to_groups(operation, weight)
        # The inputs are last, so that both products are of whole matrices, and nothing is copied in between.
        w_goki = w_goik.flatten(3).transpose(2, 3) if operation.dims else w_goik[:, :, None]
        groups, outputs, taps, inputs = w_goki.shape
        # No more of the bases than the grid needs.
        most = [max(ranks) for ranks in zip(*grid, strict=True)]
        left, right = (spectrum.leading(rank).to(w_goki) for spectrum, rank in zip(spectra, most, strict=True))
        w_gpki = (left.mT @ w_goki.reshape(groups, outputs, -1)).reshape(groups, -1, inputs)
        core = (w_gpki @ right).reshape(groups, left.shape[2], taps, -1)
        # On the CPU, whose sums are in a fixed order, and where reading many values waits for no device.
        kept_pq = core.square_().sum((0, 2), dtype=torch.float64).cpu().cumsum(0).cumsum(1)
        total = float(w_goik.square().sum(dtype=torch.float64))
        lost = [total - float(kept_pq[p - 1, q - 1]) for p, q in grid]
        return [math.sqrt(max(0.0, square) / total) if total > 0 else 0.0 for square in lost]

    def lowering(self, operation: Operation, factors: Sequence[Tensor]) -> Lowering:
        """Make both outer factors orthonormal (QR), multiply the core by the rest of them, and split that."""
        core, left, right = _from_factors(operation, factors)
        (basis_left, rest_left), (basis_right, rest_right) = torch.linalg.qr(left), torch.linalg.qr(right)
        between = _outer_product(rest_left, core, rest_right.mT)
        taps, o, i = math.prod(operation.kernel), left.shape[1], right.shape[1]
        outputs, inputs = _spectra(between)
        spectra = replace(outputs, original=(o, i * taps)), replace(inputs, original=(i, o * taps))

        def split(ranks: Sequence[int]) -> tuple[Tensor, ...]:
            small, new_left, new_right = self._bases(between, ranks, spectra)
            return self._balance(operation, small, basis_left @ new_left, basis_right @ new_right)

        return Lowering(spectra, split, lambda ranks: self._loss(between, ranks, spectra))

    def _loss(self, w_goik: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        core, left, right = self._bases(w_goik, ranks, spectra)
        total = w_goik.norm()
        if total == 0:
            return 0.0
        # The projection is orthogonal, so the squared norms of the core and of the loss add up to the weight's.
        square = 1.0 - float((core.norm() / total) ** 2)
        if square < 1e-6:  # the difference cancels
            return float((w_goik - _outer_product(left, core, right.mT)).norm() / total)
        return math.sqrt(square)

    def _bases(
        self, w_goik: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the core (g, p, q, k...) and the two truncated orthonormal bases (g, o, p) and (g, i, q)."""
        left, right = (spectrum.leading(rank).to(w_goik) for spectrum, rank in zip(spectra, ranks, strict=True))
        if self.refine:
            groups = zip(w_goik, left, right, strict=True)
            left, right = map(torch.stack, zip(*(iterate_tucker(*group, self.refine) for group in groups), strict=True))
        return _outer_product(left.mT, w_goik, right), left, right


class Tucker1Out(TwoFactors):
    """``w_oik = last_op @ first_pik``: the whole kernel to fewer outputs, then up to all of them.

    The decomposition is also called channel decomposition: Zhang et al., *Accelerating Very Deep Convolutional
    Networks for Classification and Detection*, IEEE TPAMI 38 (2016); Elhoushi et al., arXiv:1909.05675.
    """

    name = "tucker1_out"
    in_float32 = True

    def first_axes(self, operation: Operation) -> tuple[int, ...]:
        """Return all dimensions."""
        return tuple(range(operation.dims))


class Tucker1In(TwoFactors):
    """``w_oik = last_oqk @ first_qi``: down to fewer inputs, then the whole kernel."""

    name = "tucker1_in"
    in_float32 = True


def _spectra(w_goik: Tensor) -> tuple[Spectrum, ...]:
    return tuple(spectrum(w_gab.flatten(2), rows_side=True) for w_gab in (w_goik, w_goik.transpose(1, 2)))


def _to_factors(operation: Operation, core: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    """Return the factors for (g, p, q, k...), (g, o, p) and (g, i, q): the inverse of ``_from_factors``."""
    ones = (1,) * operation.dims
    first, last = right.mT.flatten(0, 1), left.flatten(0, 1)
    return first.reshape(*first.shape, *ones), from_groups(operation, core), last.reshape(*last.shape, *ones)


def _from_factors(operation: Operation, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the core (g, p, q, k...) and the two matrices (g, o, p) and (g, i, q) around it."""
    first, core, last = factors
    left, first_gqi = (factor.reshape(operation.groups, -1, factor.shape[1]) for factor in (last, first))
    return to_groups(operation, core), left, first_gqi.mT


def _outer_product(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Multiply two modes of (g, a, b, k...) by (g, x, a) from the left and (g, b, y) from the right: (g, x, y, k...)."""
    groups, _, middle, *kernel = core.shape
    w_gxbk = (left @ core.flatten(2)).reshape(groups, left.shape[1], middle, -1)
    # One product for each group is faster than one for each x, which would have as few rows as there are taps.
    w_gxyk = torch.einsum("gxbk,gby->gxyk", w_gxbk, right)
    return w_gxyk.reshape(groups, left.shape[1], right.shape[2], *kernel)


def _outside(basis: Tensor, inverse: Tensor, gradient: Tensor, rest: Tensor) -> Tensor:
    """Return the part of a dense gradient outside the range of a basis (g, o, p), from the basis's gradient (g, o, p).

    ``inverse`` (g, p, o) is the basis's pseudo-inverse, and the basis is multiplied by ``rest`` (g, p, i, k...).
    """
    outside = gradient - basis @ (inverse @ gradient)
    return (outside @ pseudo_inverse(rest.flatten(2)).mT).reshape(*basis.shape[:2], *rest.shape[2:])

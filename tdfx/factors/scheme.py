"""What a scheme is: a way to write one weight as a chain of smaller ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdfx.factors.algebra import least_norm, linearize
from tdfx.factors.operation import Operation
from tdfx.ranks.spectrum import Spectrum

Factors = tuple[Tensor, ...]
"""The weights of the factors in the order of the data."""


@dataclass(frozen=True, slots=True)
class Lowering:
    """How to split given factors again at lower ranks."""

    spectra: tuple[Spectrum, ...]
    """The spectra of the joined weight, up to the ranks of the factors."""
    split: Callable[[Sequence[int]], Factors]
    """Takes ranks, none above the present ones, and returns the new factors."""
    error: Callable[[Sequence[int]], float]
    """Takes ranks, and returns the norm of what the split loses, relative to that of the joined weight."""


class Scheme(ABC):
    """A chain of operations that stands for one operation, and the maps between its weight and theirs.

    Every method takes the dense operation first; all but ``join`` take tensors in the working dtype. Dense weights and
    factors have the shape that their operation's ``weight_shape`` says. ``join`` must consist of differentiable torch
    operations, and be linear in each factor: its derivative carries the optimizer's state. A new scheme is one class that
    defines ``name``, ``full_ranks``, ``chain``, ``spectra``, ``split`` and ``join``, and is registered with
    ``tdfx.register_scheme``. ``tdfx.TwoFactors`` defines all but ``name`` for products of two matrices.

    Letters in shapes: g groups, o output and i input channels in each, p and q their ranks, k... the kernel.
    """

    name: str
    """The name in policies and plans, with the options that are set."""
    mixes_outputs: ClassVar[bool] = True
    """Whether the last factor can mix the output channels of a group, so that a metric may."""
    in_float32: ClassVar[bool] = False
    """Whether ``leading_spectra``, ``values`` and ``errors`` take a weight in float32 too, with bases in float64. A budget
    passes weights of float32 or less so, because errors of candidates need no more digits, and splits need only a basis."""
    in_auto: ClassVar[bool] = False
    """Whether a budget considers it where the policy names no scheme."""
    options: ClassVar[tuple[str, ...]] = ()
    """Settings that may follow the name, as in ``tucker2:refine=3``: whole numbers of at least 1, passed by keyword."""

    def fits(self, operation: Operation) -> bool:
        """Return True if the scheme can stand for this operation exactly: here, if it mixes both taps and channels."""
        return operation.mixes_taps_and_channels

    @abstractmethod
    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """Return the ranks at which nothing is lost, one for each mode that is cut."""

    def channels_per_rank(self, operation: Operation) -> int:
        """Return how many channels between the factors one rank stands for; ranks count the channels of one group."""
        return operation.groups

    @abstractmethod
    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Return the operations that the factors compute, in the order of the data."""

    def partial(self, ranks: Sequence[int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the names of schemes that cut only some of the same modes, with their ranks.

        They lose less at these ranks, and are faster too if the mode that they leave whole is short.
        """
        return ()

    def partial_spectra(self, spectra: Sequence[Spectrum]) -> dict[str, tuple[Spectrum, ...]]:
        """Return the spectra of the schemes of ``partial`` by name, as far as the spectra of this scheme determine them."""
        return {}

    @abstractmethod
    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return one spectrum for each rank."""

    def values(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the spectra as far as ``errors`` needs them: a scheme that needs no bases for it leaves them out."""
        return self.spectra(operation, weight)

    def leading_spectra(self, operation: Operation, weight: Tensor, ranks: Sequence[int]) -> tuple[Spectrum, ...]:
        """Return the spectra as far as splits up to some ranks need them; beyond, errors may be bounds.

        A scheme that has a faster way for large weights overrides this.
        """
        return self.spectra(operation, weight)

    @abstractmethod
    def split(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> Factors:
        """Return the factors' weights in the order of ``chain``; ``spectra`` must be those of this weight."""

    @abstractmethod
    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Return the dense weight that the chain of factors stands for."""

    def project(self, operation: Operation, factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the dense weight of least norm that gives the factors these gradients.

        The gradients of the factors are the vector-Jacobian product of ``join`` with that of the dense weight. They
        determine its projection on the tangent space of the weights that the factors can reach. Here it is found by
        iteration; a closed form is faster.
        """
        return least_norm(lambda *given: self.join(operation, given), factors, gradients)

    def refit(self, operation: Operation, factors: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Return the factors with one of them fitted to a dense weight by least squares, and the others as they are.

        A weight that is similar to the joined weight, such as its average over time, gets factors in the same bases, so that
        averaging can go on. At full rank nothing is lost. Here the largest factor is fitted, by iteration.
        """
        largest = max(range(len(factors)), key=lambda index: factors[index].numel())

        def join(factor: Tensor) -> Tensor:
            return self.join(operation, (*factors[:largest], factor, *factors[largest + 1 :]))

        # The transpose of a linear map turns its least squares into a problem of least norm.
        fitted = least_norm(lambda w: linearize(join, factors[largest : largest + 1]).pull(w)[0], (weight,), (weight,))
        return (*factors[:largest], fitted, *factors[largest + 1 :])

    def lowering(self, operation: Operation, factors: Sequence[Tensor]) -> Lowering:
        """Return how factors can be split again.

        This method works for all schemes, and joins the factors. A scheme whose outer factors can be made orthonormal
        overrides it and needs no dense weight. Shares and floors of rank rules refer to the full ranks of the operation.
        """
        weight = self.join(operation, factors)
        spectra = self.spectra(operation, weight)
        return Lowering(
            spectra,
            lambda ranks: self.split(operation, weight, ranks, spectra),
            lambda ranks: self.error(operation, weight, ranks, spectra),
        )

    def error(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        """Return the Frobenius norm of what ``split`` loses, relative to the weight's; 0 for a zero weight.

        Here it splits and joins; the values that are cut are faster to read, where they tell the same.
        """
        norm = weight.norm()
        joined = self.join(operation, self.split(operation, weight, ranks, spectra))
        return float((weight - joined).norm() / norm) if norm > 0 else 0.0

    def errors(
        self, operation: Operation, weight: Tensor, grid: Sequence[Sequence[int]], spectra: Sequence[Spectrum]
    ) -> list[float]:
        """Return the error at each of several ranks."""
        return [self.error(operation, weight, ranks, spectra) for ranks in grid]

"""What every scheme is: a way to write one weight as a chain of smaller ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tdfx.factors.operation import Operation
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Lowering:
    """What is known of given factors that they can be split anew at lower ranks."""

    spectra: tuple[Spectrum, ...]
    """Those of the weight for which the factors stand, as far as the factors' ranks go."""
    split: Callable[[Sequence[int]], tuple[Tensor, ...]]
    """From ranks, none above the present ones, to the new factors."""
    error: Callable[[Sequence[int]], float]
    """From ranks to the norm of what the split loses, relative to the present weight's."""


class Scheme(ABC):
    """A chain of operations that stands for one, and the maps between its weight and theirs.

    Every method is given the dense operation first; weights, dense and factors', are in the layout of their operation's
    ``weight_shape``. ``join`` must be built from differentiable torch operations: the optimizer's state is moved by its
    derivative.
    A new scheme is one file: subclass this, and add an instance to ``tdfx.factors.registry``.

    Letters in shapes: g groups, o output and i input channels in each, p and q their ranks, k... the kernel.
    """

    name: str
    """The word by which users ask for the scheme and by which plans record it, with its options if it has any set."""
    options: ClassVar[tuple[str, ...]] = ()
    """Settings that stand after the name, as in ``tucker2:refine=3``: whole numbers of at least 1, by keyword."""

    @abstractmethod
    def fits(self, operation: Operation) -> bool:
        """Return True if the scheme can stand for this operation exactly."""

    @abstractmethod
    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """Return the ranks at which nothing is lost; one for each mode that is cut."""

    def channels_per_rank(self, operation: Operation) -> int:
        """Return how many channels between the factors each rank stands for; ranks of groups are those of one group."""
        return operation.groups

    @abstractmethod
    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Return the operations that the factors compute, in the order of the data."""

    def partial(self, ranks: Sequence[int]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return the names of schemes that cut some of the same modes and leave others whole, with their ranks.

        They lose less at these ranks, and where the mode that they leave is short, they are faster too.
        """
        return ()

    def partial_spectra(self, spectra: Sequence[Spectrum]) -> dict[str, tuple[Spectrum, ...]]:
        """Return the spectra of the schemes of ``partial``, by name, as far as they are known from those of this one."""
        return {}

    @abstractmethod
    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return one spectrum for each rank, for a weight in the working dtype."""

    @abstractmethod
    def split(
        self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]
    ) -> tuple[Tensor, ...]:
        """Return the factors' weights in the order of ``chain``; ``spectra`` are those of this very weight."""

    @abstractmethod
    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Return the dense weight for which the chain of factors stands."""

    @abstractmethod
    def project(self, operation: Operation, factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the dense weight of least norm whose image at the factors is ``gradients``.

        The image is the vector-Jacobian product of ``join``; what it can hold of a gradient is the projection on the
        tangent space of the weights that the factors can reach. The arguments are in the working dtype.
        """

    @abstractmethod
    def refit(self, operation: Operation, factors: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Return the factors with one of them fitted to a dense weight by least squares, and the others as they are.

        What is like the weight for which the factors stand, such as its average over time, gets factors in the same bases,
        so that the two can go on being averaged. At full rank nothing is lost. The arguments are in the working dtype.
        """

    def lowering(self, operation: Operation, factors: Sequence[Tensor]) -> Lowering:
        """Return how factors can be split anew; the arguments are in the working dtype.

        A scheme whose outer factors can be made orthonormal needs no dense weight for it; this, which serves all, joins
        them. Shares and floors of rank rules refer to the full ranks of the operation.
        """
        weight = self.join(operation, factors)
        spectra = self.spectra(operation, weight)
        return Lowering(
            spectra=spectra,
            split=lambda ranks: self.split(operation, weight, ranks, spectra),
            error=lambda ranks: self.error(operation, weight, ranks, spectra),
        )

    @abstractmethod
    def error(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        """Return the Frobenius norm of what ``split`` loses, relative to the weight's; 0 for a zero weight."""

    def errors(
        self, operation: Operation, weight: Tensor, grid: Sequence[Sequence[int]], spectra: Sequence[Spectrum]
    ) -> list[float]:
        """Return the error at each of many ranks."""
        return [self.error(operation, weight, ranks, spectra) for ranks in grid]

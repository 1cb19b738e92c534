"""Ranks by the size of the singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tdfx.checks import is_number
from tdfx.errors import PolicyError
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.signal import NO_SIGNAL, has_signal
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold(RankRule):
    """Keep the singular values above a given value, in every mode of the weight.

    A weight whose spectrum is that of noise is kept as it is, and so is a weight with a mode in which no value is above.

    Source: the numerical rank, Golub and Van Loan, *Matrix Computations*, 4th edition, section 5.4.1.
    """

    above: float
    """What a singular value must exceed: a value in the units of the weight, not negative; or, with ``relative``, a share of
    the largest singular value, in (0, 1)."""
    relative: bool = False
    """True if ``above`` is a share of the largest singular value of each mode."""

    def __post_init__(self) -> None:
        if self.relative and not (is_number(self.above) and 0 < self.above < 1):
            raise PolicyError(
                f"above={self.above!r} is not in (0, 1): with relative=True it is the part of the largest singular value "
                f"that a kept one exceeds. For one percent pass above=0.01."
            )
        if not is_number(self.above) or self.above < 0:
            raise PolicyError(
                f"above={self.above!r} is not a number of at least 0: it is the singular value that a kept one exceeds. "
                f"Pass for example above=0.1, or above=0.01 with relative=True for one percent of the largest."
            )

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return, for each spectrum, how many singular values are above the threshold."""
        if not has_signal(spectra):
            return Choice((), kept=NO_SIGNAL, signal=False)
        largest = [float(spectrum.values.max()) for spectrum in spectra]
        limits = [value * self.above if self.relative else self.above for value in largest]
        ranks = tuple(int((spectrum.values > limit).sum()) for spectrum, limit in zip(spectra, limits, strict=True))
        note = f"no singular value is above {self.above:g}: the largest is {min(largest):.3g}"
        return Choice((), kept=note, signal=False) if 0 in ranks else Choice(ranks)

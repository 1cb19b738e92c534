"""Ranks by the share of the squared singular values that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tdfx.checks import check_share
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.signal import NO_SIGNAL, has_signal
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Energy(RankRule):
    """Keep the fewest singular values that hold a given share of the energy, in every mode of the weight.

    A weight whose spectrum is that of noise is kept as it is: its ranks would say nothing about what it will learn.
    """

    share: float = 0.9
    """Share of ``sum(s**2)`` to keep, in (0, 1]; no unit."""

    def __post_init__(self) -> None:
        meaning = "the part of the squared singular values to keep"
        check_share("share", self.share, meaning, "For 95 percent pass share=0.95.")

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return, for each spectrum, the smallest rank whose energy reaches ``share``."""
        if not has_signal(spectra):
            return Choice((), kept=NO_SIGNAL, signal=False)
        return Choice(tuple(self._rank(spectrum) for spectrum in spectra))

    def _rank(self, spectrum: Spectrum) -> int:
        below = int((spectrum.energy() < self.share).sum()) if self.share < 1 else spectrum.full_rank
        return min(below + 1, spectrum.full_rank)

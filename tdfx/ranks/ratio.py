"""Ranks as a fixed share of the full rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tdfx.checks import check_share
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Ratio(RankRule):
    """Keep a share of the site's full rank in each mode, whatever the values of the weight are."""

    of: float = 0.25
    """Share of the full rank to keep in each mode, in (0, 1]; 1.0 keeps every rank, so that the rewrite is exact."""

    def __post_init__(self) -> None:
        check_share("of", self.of, "the part of each full rank to keep", "For a quarter of the ranks pass of=0.25.")

    @property
    def reads_values(self) -> bool:
        """False, unless a subclass has a ``choose`` of its own."""
        return type(self).choose is not Ratio.choose

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return ``of`` times each full rank, rounded to the nearest whole rank, at least 1."""
        return Choice(tuple(max(1, round(self.of * spectrum.full_rank)) for spectrum in spectra))

"""Ranks by variational Bayesian matrix factorization, with a floor that keeps early use safe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tdfx.ranks.rule import Choice, RankRule, check_share
from tdfx.ranks.signal import NO_SIGNAL, signal_rank
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class VBMF(RankRule):
    """Keep the components that stand above the noise, as the analytic EVBMF solution estimates it.

    The rule was made for weights that have been trained. In the first epochs it sees almost nothing but noise and says
    1 to 5 of 64 to 256, which ruins a run. Two guards: rank 0 keeps the site as it is, and no rank falls below ``floor``.

    Source: Nakajima, Sugiyama, Babacan, Tomioka, *Global Analytic Solution of Fully-observed Variational Bayesian Matrix
    Factorization*, JMLR 14 (2013); used for training by Elhoushi et al., arXiv:1909.05675.
    """

    floor: float = 0.25
    """Least share of the full rank to keep in each mode, in [0, 1]; 0 trusts the estimate, for weights trained to the
    end. Where the floor was applied the plan says so."""

    def __post_init__(self) -> None:
        check_share(
            "floor",
            self.floor,
            "the least part of each full rank to keep",
            "For an eighth pass floor=0.125; to trust the estimate alone pass floor=0.",
            zero_allowed=True,
        )

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the EVBMF rank of each spectrum, floored; no ranks where any of them shows no signal."""
        found = tuple(signal_rank(one) for one in spectra)
        if min(found) == 0:
            return Choice((), kept=NO_SIGNAL, signal=False)
        least = tuple(math.ceil(self.floor * one.full_rank) for one in spectra)
        ranks = tuple(max(pair) for pair in zip(found, least, strict=True))
        floored = f"VBMF says {'/'.join(map(str, found))}, floored" if ranks != found else ""
        return Choice(ranks, note=floored)

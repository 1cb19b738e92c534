"""Ranks by variational Bayesian matrix factorization, with a floor that keeps early use safe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tdfx.checks import check_share
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.signal import NO_SIGNAL, signal_rank
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class VBMF(RankRule):
    """Keep the components that stand above the noise, as the analytic EVBMF solution estimates it.

    The rule was made for trained weights. In the first epochs it sees little but noise and estimates ranks of 1 to 5 out of
    64 to 256, which ruins a run. Therefore rank 0 keeps the site as it is, and no rank falls below ``floor``. MUSCO's
    weakening, applied before the floor, is a softer guard: with ``weaken`` of at most 1 - ``floor`` no rank reaches it.

    Source: Nakajima, Sugiyama, Babacan, Tomioka, *Global Analytic Solution of Fully-observed Variational Bayesian Matrix
    Factorization*, JMLR 14 (2013); used for training by Elhoushi et al., arXiv:1909.05675; weakening: Gusak et al.,
    *MUSCO: Multi-Stage Compression of neural networks*, ICCV Workshops 2019, arXiv:1903.09973.
    """

    floor: float = 0.25
    """Least share of the full rank to keep in each mode, in [0, 1]; 0 trusts the estimate, for fully trained weights."""
    weaken: float = 1.0
    """Part of the way from the full rank down to the estimate, in (0, 1]: the rank is full - weaken * (full - estimate),
    rounded up."""

    def __post_init__(self) -> None:
        advice = "For an eighth pass floor=0.125; to trust the estimate alone pass floor=0."
        check_share("floor", self.floor, "the least part of each full rank to keep", advice, zero_allowed=True)
        advice = "For half the way pass weaken=0.5; for the estimate itself pass weaken=1."
        check_share("weaken", self.weaken, "the part of the way from the full rank to the estimate", advice)

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the EVBMF rank of each spectrum, weakened and floored; no ranks where any of them shows no signal."""
        estimates = tuple(signal_rank(spectrum) for spectrum in spectra)
        if min(estimates) == 0:
            return Choice((), kept=NO_SIGNAL, signal=False)
        full = tuple(spectrum.full_rank for spectrum in spectra)
        pairs = list(zip(estimates, full, strict=True))
        weakened = tuple(most - math.floor(self.weaken * (most - rank)) for rank, most in pairs)
        ranks = tuple(max(rank, math.ceil(self.floor * most)) for rank, most in zip(weakened, full, strict=True))
        changes = (", weakened" if weakened != estimates else "") + (", floored" if ranks != weakened else "")
        return Choice(ranks, note=f"VBMF says {'/'.join(map(str, estimates))}{changes}" if changes else "")

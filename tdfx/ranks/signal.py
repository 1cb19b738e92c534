"""Is there anything above the noise in a weight yet?"""

from __future__ import annotations

from collections.abc import Sequence

from tdfx.ranks.evbmf import evbmf_rank
from tdfx.ranks.spectrum import Spectrum

NO_SIGNAL = "its spectrum is still that of noise: train longer before it is decomposed, or give its ranks with Ratio"


def has_signal(spectra: Sequence[Spectrum]) -> bool:
    """Return True if EVBMF finds at least one component above the noise in every unfolding."""
    return all(evbmf_rank(one.values, one.rows, one.cols) > 0 for one in spectra)

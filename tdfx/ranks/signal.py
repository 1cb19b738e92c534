"""Whether a weight shows anything above the noise yet."""

from __future__ import annotations

from collections.abc import Sequence

from tdfx.ranks.evbmf import evbmf_rank, finds_signal
from tdfx.ranks.spectrum import Spectrum

NO_SIGNAL = "its spectrum is still that of noise: train longer, or use Ratio"


def has_signal(spectra: Sequence[Spectrum]) -> bool:
    """Return True if EVBMF finds at least one component above the noise in every unfolding."""
    return all(
        spectrum.full_rank == 1 or finds_signal(spectrum.values, spectrum.rows, spectrum.cols, spectrum.residual)
        for spectrum in spectra
    )


def signal_rank(spectrum: Spectrum) -> int:
    """Return the EVBMF rank; 1 for a single component, which no spectrum can tell from noise."""
    if spectrum.full_rank == 1:
        return 1
    return evbmf_rank(spectrum.values, spectrum.rows, spectrum.cols, spectrum.residual)

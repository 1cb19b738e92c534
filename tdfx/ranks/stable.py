"""Ranks by the stable rank, scaled so that a weight that has not been trained scores its full rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from tdfx.checks import is_number
from tdfx.errors import PolicyError
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.signal import NO_SIGNAL, has_signal
from tdfx.ranks.spectrum import Spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class StableRank(RankRule):
    """Keep the scaled stable rank of each mode: ``sum(s**2) / max(s**2)``, times its full rank over its initial stable rank.

    For independent entries of variance v an m x n matrix has ``sum(s**2) = m n v`` and, at the edge of the Marchenko-Pastur
    law, ``max(s**2) = (sqrt(m) + sqrt(n))**2 v``. The factor is therefore ``(1 + sqrt(a))**2`` with a the shorter side over
    the longer: 4 for a square matrix. This holds for torch's own initial weights; for others, such as orthogonal ones:

    >>> import torch
    >>> weight = torch.nn.init.orthogonal_(torch.empty(32, 64))
    >>> stable = (torch.linalg.matrix_norm(weight) / torch.linalg.matrix_norm(weight, 2)) ** 2
    >>> rule = StableRank(initial={"fc": float(stable)})

    A weight whose spectrum is that of noise is kept as it is: at its initialisation it would score its full rank.

    Source: Wang et al., *Cuttlefish: Low-Rank Model Training without All the Tuning*, MLSys 2023, arXiv:2305.02538, whose
    code truncates stable ranks to whole numbers before it scales them, which is not done here; the largest singular value:
    Geman, *A Limit Theorem for the Norm of Random Matrices*, Annals of Probability 8 (1980).
    """

    initial: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    """Glob over site names -> the stable rank of the initial weight, one for every mode or a tuple of one for each mode
    (tucker2: output, input), at least 1. The first pattern that matches a site is used; other sites use the closed form."""

    def __post_init__(self) -> None:
        if not isinstance(self.initial, Mapping):
            raise PolicyError(
                f"initial={self.initial!r} does not map site patterns to stable ranks. Pass for example "
                f"initial={{'layer4.*': 40.0}}, or leave it out for weights whose entries were drawn independently."
            )
        # The rule is frozen, and the caller's dictionary is not.
        initial = {
            pattern: tuple(given) if isinstance(given, list) else given for pattern, given in self.initial.items()
        }
        for pattern, given in initial.items():
            stable_ranks = given if isinstance(given, tuple) else (given,)
            if not stable_ranks or not all(is_number(stable_rank) and stable_rank >= 1 for stable_rank in stable_ranks):
                raise PolicyError(
                    f"The initial stable rank {given!r} for {pattern!r} is not a number of at least 1, nor a tuple of them: "
                    f"it is sum(s**2) / max(s**2) of the weight before training."
                )
        object.__setattr__(self, "initial", initial)

    def __hash__(self) -> int:
        return hash(tuple(self.initial.items()))

    def patterns(self) -> tuple[str, ...]:
        """Return the patterns for which initial stable ranks were given."""
        return tuple(self.initial)

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        """Return the scaled stable rank of each spectrum, rounded up and at most the full rank.

        Raises:
            PolicyError: The number of initial stable ranks is not the scheme's.
        """
        if not has_signal(spectra):
            return Choice((), kept=NO_SIGNAL, signal=False)
        scaled = [
            math.ceil(spectrum.full_rank * spectrum.stable_rank() / initial)
            for spectrum, initial in zip(spectra, self._initial(site, spectra), strict=True)
        ]
        return Choice(tuple(min(rank, spectrum.full_rank) for rank, spectrum in zip(scaled, spectra, strict=True)))

    def _initial(self, site: str, spectra: Sequence[Spectrum]) -> tuple[float, ...]:
        given = next((value for pattern, value in self.initial.items() if fnmatchcase(site, pattern)), None)
        if given is None:
            return tuple(initial_stable_rank(*spectrum.shape) for spectrum in spectra)
        stable_ranks = given if isinstance(given, tuple) else (given,) * len(spectra)
        if len(stable_ranks) != len(spectra):
            raise PolicyError(
                f"StableRank has {len(stable_ranks)} initial stable ranks {stable_ranks} for site {site!r}, whose scheme "
                f"takes {len(spectra)}. Give one number for all modes, or a tuple of {len(spectra)}."
            )
        return stable_ranks


def initial_stable_rank(rows: int, cols: int) -> float:
    """Return the stable rank of a large matrix with independent entries of one variance.

    >>> initial_stable_rank(64, 64), initial_stable_rank(64, 576)
    (16.0, 36.0)
    """
    return rows * cols / (math.sqrt(rows) + math.sqrt(cols)) ** 2

"""Matrices and spectra for the tests of the rank rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tdfx.ranks.spectrum import Spectrum


def noise(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, dtype=torch.float64)


def planted(rows: int, cols: int, rank: int, strength: float = 10.0) -> Tensor:
    """Return a matrix whose first ``rank`` singular values are ``strength`` times the edge of the noise."""
    left, right = torch.linalg.qr(noise(rows, rank))[0], torch.linalg.qr(noise(cols, rank))[0]
    size = strength * (math.sqrt(rows) + math.sqrt(cols))
    signal: Tensor = size * left @ right.mT
    return signal + noise(rows, cols)


def spectrum_of(values: list[float], rows: int = 0, cols: int = 0) -> Spectrum:
    """Return a spectrum with given values; rules do not read the basis."""
    count = len(values)
    s = torch.tensor(values, dtype=torch.float64)
    return Spectrum(s, torch.eye(count, dtype=torch.float64), rows or count, cols or count)

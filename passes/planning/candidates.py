"""The ways to factorize one site among which a budget chooses, with the error of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.passes.planning.proposals import rounded
from tdfx.passes.planning.site_cost import Candidate
from tdfx.passes.planning.spectra import Spectra, SpectrumCache
from tdfx.passes.planning.weights import working_weight
from tdfx.passes.program import Site
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.ranks.signal import has_signal
from tdfx.ranks.spectrum import Spectrum

_SCHEMES = ("tucker2", "tucker1_out", "tucker1_in", "spatial", "svd")
"""What a budget chooses among, where the policy names no scheme."""
_LEVELS = 16
"""Ranks that are tried of each scheme, from ``_HIGHEST`` of the full rank down to 1."""
_HIGHEST = 0.9
"""Share of the full rank from which ranks are tried downwards."""
_SMALL_ERROR = 0.1
"""Squared error, relative to the weight's square, up to which ranks below the budget's floor are allowed."""
_LARGEST_SIDE = 1024
"""Longest side that is decomposed for the spatial scheme, which competes with others: more would take too long."""


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """The candidates for one dense site."""

    errors: dict[Candidate, float]
    """The error of each candidate, relative to the weight's norm."""
    signal: bool
    """Whether the weight shows anything above the noise."""


def candidates_of(site: Site, policy: Policy, cache: SpectrumCache, weight: Tensor) -> CandidateSet:
    """Return the candidates for a dense site that the policy's budget allows; the cache keeps the bases if it has room."""
    operation, budget = site.known_operation, policy.rank
    assert isinstance(budget, Budget)
    w_dense = working_weight(site, weight)
    shared: dict[str, Spectra] = {}
    errors: dict[Candidate, float] = {}
    signal: bool | None = None
    for scheme in schemes_for(operation, policy):
        spectra = shared.get(scheme.name) or scheme.spectra(operation, w_dense)
        if not shared or scheme.name in shared:
            # The first scheme and those that share its bases; the bases of others would take the room of other sites.
            cache.hold(site, scheme, spectra)
        shared |= {scheme.name: spectra, **scheme.partial_spectra(spectra)}
        signal = has_signal(spectra) if signal is None else signal
        full = scheme.full_ranks(operation)
        grid = _grid(spectra, full, policy, site, scheme)
        for ranks, error in zip(grid, scheme.errors(operation, w_dense, grid, spectra), strict=True):
            floor = budget.floor if error**2 > _SMALL_ERROR else 0.0
            if not signal:
                floor = max(budget.floor, budget.noise_floor)
            if all(rank >= floor * most for rank, most in zip(ranks, full, strict=True)):
                errors[Candidate(scheme, ranks)] = error
    return CandidateSet(errors, bool(signal))


def schemes_for(operation: Operation, policy: Policy) -> Iterator[Scheme]:
    """Yield the schemes among which a budget chooses for a site."""
    is_auto = policy.scheme == AUTO
    for scheme in map(get_scheme, _SCHEMES if is_auto else (policy.scheme,)):
        if not scheme.fits(operation) or (is_auto and operation.is_depthwise):
            continue
        if not is_auto or scheme.name != "spatial" or max(scheme.full_ranks(operation)) <= _LARGEST_SIDE:
            yield scheme


def _grid(
    spectra: Sequence[Spectrum], full: Sequence[int], policy: Policy, site: Site, scheme: Scheme
) -> list[tuple[int, ...]]:
    """Return ranks from high to low that lose about equally much in each mode; never all modes at full rank."""
    energies = [spectrum.energy() for spectrum in spectra]
    grid = []
    for level in range(_LEVELS):
        # In equal ratios, down to rank 1.
        shares = tuple(max(1, round((_HIGHEST * most) ** (1 - level / (_LEVELS - 1)))) for most in full)
        # A mode whose values fall off faster gets fewer ranks than its share, at the same loss.
        loss = max(_tail(energy, rank) for energy, rank in zip(energies, shares, strict=True))
        even = tuple(_fewest_ranks(energy, loss) for energy in energies)
        grid += [rounded(ranks, full, policy, site, scheme) for ranks in (shares, even)]
    return [ranks for ranks in dict.fromkeys(grid) if any(rank < most for rank, most in zip(ranks, full, strict=True))]


def _tail(energy: Tensor, rank: int) -> float:
    return 1.0 - float(energy[min(rank, len(energy)) - 1])


def _fewest_ranks(energy: Tensor, loss: float) -> int:
    return min(int(torch.searchsorted(energy, 1.0 - loss - 1e-12)) + 1, len(energy))

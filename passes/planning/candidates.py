"""The ways to factorize one site among which a budget chooses, and what each of them loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.passes.planning.proposals import Candidate, rounded
from tdfx.passes.planning.weights import working_weight
from tdfx.passes.program import Site
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.ranks.signal import has_signal
from tdfx.ranks.spectrum import Spectrum

_SCHEMES = ("tucker2", "tucker1_out", "tucker1_in", "spatial", "svd")
"""What a budget chooses among, where the policy names no scheme."""
_LEVELS = 16
"""Ranks that are tried of each scheme: from those that lose the least that is worth anything to the lowest."""
_HIGHEST = 0.9
"""Share of the full rank from which ranks are tried downwards."""
_LITTLE = 0.1
"""Share of its square that a weight may lose in ranks below the budget's floor."""
_LARGEST = 1024
"""Longest side that is decomposed for a scheme which stands beside another: more would take too long."""


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """What a dense site may become."""

    options: tuple[tuple[Candidate, float], ...]
    """Each with its loss: the squared error of the weight, relative to its square."""
    signal: bool
    """Whether anything in its weight stands above the noise."""


def options_of(site: Site, policy: Policy, weight: Tensor) -> CandidateSet:
    """Return the options of a dense site that the policy's budget allows.

    Args:
        site: A site that may be rewritten.
        policy: What is in force for it, with a budget.
        weight: Its values, as the model holds them.
    """
    operation, budget = site.operation, policy.rank
    assert operation is not None
    assert isinstance(budget, Budget)
    dense = working_weight(site, weight)
    known: dict[str, Sequence[Spectrum]] = {}
    found: list[tuple[Candidate, float]] = []
    signal: bool | None = None
    for scheme in schemes_for(operation, policy):
        spectra = known.get(scheme.name) or scheme.spectra(operation, dense)
        known |= scheme.partial_spectra(spectra)
        signal = has_signal(spectra) if signal is None else signal
        full = scheme.full_ranks(operation)
        grid = _grid(spectra, full, policy, site, scheme)
        for ranks, error in zip(grid, scheme.errors(operation, dense, grid, spectra), strict=True):
            loss = error**2
            floor = budget.floor if loss > _LITTLE else 0.0
            if not signal:
                floor = max(budget.floor, budget.noise_floor)
            if all(rank >= floor * most for rank, most in zip(ranks, full, strict=True)):
                found.append((Candidate(scheme, ranks), loss))
    return CandidateSet(tuple(found), bool(signal))


def pack_options(site: Site, policy: Policy, *weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``options_of`` finds in a form that can be sent.

    That is a table with scheme, two ranks (0 for none) and loss in each row, and whether there is signal.
    """
    (weight,) = weights
    found = options_of(site, policy, weight)
    rows = [
        (_SCHEMES.index(option.scheme.name) if policy.scheme == AUTO else 0, *_pair(option.ranks), lost)
        for option, lost in found.options
    ]
    signal = torch.tensor([found.signal], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4), signal


def unpack_options(policy: Policy, table: Tensor, signal: Tensor) -> CandidateSet:
    """Return what ``pack_options`` was made of."""
    names = _SCHEMES if policy.scheme == AUTO else (policy.scheme,)
    options = (
        (Candidate(get_scheme(names[int(row[0])]), tuple(int(rank) for rank in row[1:3] if rank)), row[3])
        for row in table.tolist()
    )
    return CandidateSet(tuple(options), bool(signal))


def _pair(ranks: Sequence[int]) -> tuple[int, int]:
    first, *rest = ranks
    return first, rest[0] if rest else 0


def schemes_for(operation: Operation, policy: Policy) -> Iterator[Scheme]:
    """Yield the schemes among which a budget chooses for a site."""
    if policy.scheme != AUTO:
        scheme = get_scheme(policy.scheme)
        if scheme.fits(operation):
            yield scheme
        return
    for scheme in map(get_scheme, _SCHEMES):
        if not scheme.fits(operation) or operation.is_depthwise:
            continue
        if scheme.name != "spatial" or max(scheme.full_ranks(operation)) <= _LARGEST:
            yield scheme


def _grid(
    spectra: Sequence[Spectrum], full: Sequence[int], policy: Policy, site: Site, scheme: Scheme
) -> list[tuple[int, ...]]:
    """Return ranks that lose about equally much in each mode, from high to low, without any at which all are full."""
    energies = [one.energy() for one in spectra]
    found = []
    for level in range(_LEVELS):
        # In equal ratios, down to rank 1.
        shares = tuple(max(1, round((_HIGHEST * most) ** (1 - level / (_LEVELS - 1)))) for most in full)
        # Where the values fall off unevenly, the mode that loses less gets fewer ranks than its share of them.
        cut = max(_tail(energy, rank) for energy, rank in zip(energies, shares, strict=True))
        even = tuple(_least_rank(energy, cut) for energy in energies)
        found += [rounded(ranks, full, policy, site, scheme) for ranks in (shares, even)]
    return [ranks for ranks in dict.fromkeys(found) if any(rank < most for rank, most in zip(ranks, full, strict=True))]


def _tail(energy: Tensor, rank: int) -> float:
    return 1.0 - float(energy[min(rank, len(energy)) - 1])


def _least_rank(energy: Tensor, cut: float) -> int:
    """Return the fewest ranks that lose no more than a share of the energy."""
    return min(int(torch.searchsorted(energy, 1.0 - cut - 1e-12)) + 1, len(energy))

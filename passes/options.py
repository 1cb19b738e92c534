"""The ways to factorize one site among which a budget chooses, and what each of them loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tdfx.factors.operation import Operation
from tdfx.factors.registry import AUTO, get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.passes.base import Site
from tdfx.passes.propose import Option, rounded
from tdfx.passes.weights import working_weight
from tdfx.policy import Policy
from tdfx.ranks.spectrum import Spectrum

_SCHEMES = ("tucker2", "tucker1_out", "tucker1_in", "spatial", "svd")
"""What a budget chooses among, where the policy names no scheme."""
_LEVELS = 16
"""Ranks that are tried of each scheme: from those that lose the least that is worth anything to the lowest."""
_HIGHEST = 0.9
"""Share of the full rank from which ranks are tried downwards."""
_LARGEST = 1024
"""Longest side that is decomposed for a scheme which stands beside another: more would take too long."""

Loss = Callable[[Tensor], float]
"""From what a weight loses, in the layout of its operation and the working dtype, to what that adds to the total."""


def options_of(site: Site, policy: Policy, weight: Tensor, loss: Loss | None) -> Iterator[tuple[Option, float]]:
    """Yield the options of a dense site, each with its loss.

    Args:
        site: A site that may be rewritten.
        policy: What is in force for it.
        weight: Its values, as the model holds them.
        loss: What an error adds; None for its square relative to the weight's.
    """
    operation = site.operation
    assert operation is not None
    dense = working_weight(site, weight)
    known: dict[str, Sequence[Spectrum]] = {}
    for scheme in schemes_for(operation, policy):
        spectra = known.get(scheme.name) or scheme.spectra(operation, dense)
        known |= scheme.partial_spectra(spectra)
        grid = _grid(spectra, scheme.full_ranks(operation), policy, site, scheme)
        if loss is None:
            losses = [error**2 for error in scheme.errors(operation, dense, grid, spectra)]
        else:
            splits = (scheme.split(operation, dense, ranks, spectra) for ranks in grid)
            losses = [loss(dense - scheme.join(operation, factors)) for factors in splits]
        yield from zip((Option(scheme, ranks) for ranks in grid), losses, strict=True)


def pack_options(site: Site, policy: Policy, loss: Loss | None, *weights: Tensor) -> tuple[Tensor]:
    """Return the options of a site as a table that can be sent: scheme, two ranks (0 for none) and loss in each row."""
    (weight,) = weights
    rows = [
        (_SCHEMES.index(option.scheme.name) if policy.scheme == AUTO else 0, *_pair(option.ranks), lost)
        for option, lost in options_of(site, policy, weight, loss)
    ]
    return (torch.tensor(rows, dtype=torch.float64).reshape(-1, 4),)


def unpack_options(policy: Policy, table: Tensor) -> list[tuple[Option, float]]:
    """Return what ``pack_options`` was made of."""
    names = _SCHEMES if policy.scheme == AUTO else (policy.scheme,)
    return [
        (Option(get_scheme(names[int(row[0])]), tuple(int(rank) for rank in row[1:3] if rank)), row[3])
        for row in table.tolist()
    ]


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

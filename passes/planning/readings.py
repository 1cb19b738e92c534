"""What is read of the weights while a plan is made: spectra for the ranks, and what each choice of ranks loses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tdfx.distributed.processes import Spread, Task
from tdfx.factors.scheme import Lowering, Scheme
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full
from tdfx.passes.planning.proposals import Candidate
from tdfx.passes.planning.spectra import ROOM, KeptSpectra, Spectra
from tdfx.passes.planning.weights import lowering_of, working_weight
from tdfx.passes.program import Site
from tdfx.ranks.spectrum import pack, unpack, working_dtype


class Readings:
    """Reads each weight once for its ranks and, where there is room, for its split."""

    def __init__(self) -> None:
        self.kept = KeptSpectra()
        """What the rewrite may go on with."""
        self._together: dict[str, Spectra] = {}
        self._errors: dict[tuple[str, str, tuple[int, ...]], float] = {}
        self._lowering_in_hand: tuple[str, Lowering] | None = None

    def make_room(self, weights: Iterable[Tensor]) -> None:
        """Allow bases to take a few times what the largest of the weights takes."""
        self.kept.room = ROOM * max((one.numel() * working_dtype(one).itemsize for one in weights), default=0)

    def read_together(self, cases: Sequence[tuple[Site, Scheme]], spread: Spread) -> None:
        """Read every weight once, shared among the processes; of the spectra keep the values, which are small."""
        tasks = [Task(partial(_packed_spectra, site, scheme), site.weights) for site, scheme in cases]
        for (site, _), found in zip(cases, spread(tasks), strict=True):
            self._together[site.name] = tuple(map(unpack, found[::2], found[1::2]))

    def spectra_of(self, site: Site, scheme: Scheme) -> Spectra:
        """Return the spectra of what a site computes with now."""
        if site.name in self._together:
            return self._together[site.name]
        known = self.kept.values(site, scheme)
        if known is not None:
            return known
        if isinstance(site.layer, Factorized):
            return self.kept.put(site, scheme, self._lowering(site, site.layer).spectra)
        assert site.operation is not None
        return self.kept.put(site, scheme, scheme.spectra(site.operation, working_weight(site)))

    def know(self, site: Site, errors: Mapping[Candidate, float]) -> None:
        """Take the errors of a site's options from somebody who worked them out."""
        self._errors |= {_key(site, option): error for option, error in errors.items()}

    def foresee(self, site: Site, option: Candidate) -> None:
        """Work out what an option loses while the bases are in hand, and keep of these what its split needs."""
        (error,) = self.error(site, option, *map(full, site.weights))
        self.know(site, {option: float(error)})
        if isinstance(site.layer, Factorized):
            self.drop(site, option.scheme)  # its split begins with the factors
        else:
            self.kept.cut(site, option.scheme, option.ranks)

    def drop(self, site: Site, scheme: Scheme) -> None:
        """Let go of the bases of a site that will not be split by a scheme."""
        self.kept.take(site, scheme)

    def error(self, site: Site, option: Candidate, *weights: Tensor) -> tuple[Tensor]:
        """Return what an option loses, relative to the weight, as one number."""
        known = self._errors.get(_key(site, option))
        found = self._error(site, option, weights) if known is None else known
        return (torch.tensor(found, dtype=torch.float64),)

    def _error(self, site: Site, option: Candidate, weights: Sequence[Tensor]) -> float:
        if isinstance(site.layer, Factorized):
            return self._lowering(site, site.layer, weights).error(option.ranks)
        assert site.operation is not None
        weight = working_weight(site, *weights)
        spectra = self.kept.bases(site, option.scheme)
        if spectra is None:
            spectra = self.kept.put(site, option.scheme, option.scheme.spectra(site.operation, weight))
        return option.scheme.error(site.operation, weight, option.ranks, spectra)

    def _lowering(self, site: Site, layer: Factorized, weights: Sequence[Tensor] | None = None) -> Lowering:
        """Return how a layer's factors can be split anew, worked out once while it is looked at."""
        if self._lowering_in_hand is None or self._lowering_in_hand[0] != site.name:
            self._lowering_in_hand = None  # two at once would be too many
            self._lowering_in_hand = site.name, lowering_of(layer, weights)
        return self._lowering_in_hand[1]


def _key(site: Site, option: Candidate) -> tuple[str, str, tuple[int, ...]]:
    return site.name, option.scheme.name, option.ranks


def _packed_spectra(site: Site, scheme: Scheme, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return two tensors for each spectrum of what a site computes with: the values, and what else is to be known."""
    assert site.operation is not None
    if isinstance(site.layer, Factorized):
        spectra = lowering_of(site.layer, weights).spectra
    else:
        spectra = scheme.spectra(site.operation, working_weight(site, *weights))
    return tuple(part for one in spectra for part in pack(one))

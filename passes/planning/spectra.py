"""The spectra of sites between the reading of ranks and the split: values for all of them, bases as far as there is room."""

from __future__ import annotations

import torch

from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Scheme
from tdfx.passes.program import Site
from tdfx.ranks.spectrum import Spectrum

Spectra = tuple[Spectrum, ...]
"""One spectrum for each rank of a scheme."""

ROOM = 2
"""Working copies of the largest weight that the bases of all sites may take together, beside those of the site in hand."""


class KeptSpectra:
    """Spectra by site and scheme, in bounded memory.

    A basis costs an eigendecomposition, and all of them together take more memory than the weights of many models. So the
    values, which are small, are kept of every site. Bases are kept whole only of the last site that was read. Once a
    site's ranks are chosen, its basis is cut to them, and kept for the split as far as ``room`` goes. What found no room
    is ``None`` here and has to be computed again, which gives the same bits.
    """

    def __init__(self, room: int = 0) -> None:
        """Take the bytes that may be kept."""
        self.room = room
        self._values: dict[tuple[str, str], Spectra] = {}
        self._bases: dict[tuple[str, str], Spectra] = {}
        self._in_hand: tuple[tuple[str, str], Spectra] | None = None

    @property
    def names(self) -> set[str]:
        """The sites of which there are bases."""
        last = () if self._in_hand is None else (self._in_hand[0],)
        return {name for name, _ in (*self._bases, *last)}

    def put(self, site: Site, scheme: Scheme, spectra: Spectra) -> Spectra:
        """Take the spectra of the site that is looked at now, and return them."""
        key = _key(site, scheme)
        self._values[key] = tuple(one.without_basis() for one in spectra)
        self._in_hand = key, spectra
        return spectra

    def values(self, site: Site, scheme: Scheme) -> Spectra | None:
        """Return the spectra of a site, for what needs no basis; None if it was not read."""
        return self._values.get(_key(site, scheme))

    def bases(self, site: Site, scheme: Scheme) -> Spectra | None:
        """Return the spectra of a site with their bases, as far as its ranks go at least; None where these are gone."""
        key = _key(site, scheme)
        if self._in_hand is not None and self._in_hand[0] == key:
            return self._in_hand[1]
        return self._bases.get(key)

    def cut(self, site: Site, scheme: Scheme, ranks: tuple[int, ...]) -> None:
        """Keep of a site's bases what a split at these ranks needs, if there is room for it."""
        spectra = self.bases(site, scheme)
        self.take(site, scheme)
        if spectra is not None:
            cut = tuple(one.cut(rank) for one, rank in zip(spectra, ranks, strict=True))
            size = _size(cut)
            if size <= self.room:
                self.room -= size
                self._bases[_key(site, scheme)] = cut

    def take(self, site: Site, scheme: Scheme) -> Spectra | None:
        """Return what ``bases`` does, and keep it no longer."""
        found = self.bases(site, scheme)
        key = _key(site, scheme)
        self.room += _size(self._bases.pop(key, ()))
        if self._in_hand is not None and self._in_hand[0] == key:
            self._in_hand = None
        return found


def unread(scheme: Scheme, operation: Operation) -> Spectra:
    """Return spectra without values, for rules that ask for full ranks alone."""
    nothing = torch.empty(0, dtype=torch.float64)
    return tuple(Spectrum(nothing, nothing, rank, rank) for rank in scheme.full_ranks(operation))


def _key(site: Site, scheme: Scheme) -> tuple[str, str]:
    return site.name, scheme.name


def _size(spectra: Spectra) -> int:
    return sum(one.basis.numel() * one.basis.element_size() for one in spectra)

"""The spectra of sites between the reading of ranks and the split, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tdfx.factors.scheme import Lowering, Scheme
from tdfx.layers.factorized import Factorized
from tdfx.passes.planning.weights import lowering_of, working_weight
from tdfx.passes.program import Site
from tdfx.ranks.spectrum import Spectrum

Spectra = tuple[Spectrum, ...]
"""One spectrum for each rank of a scheme."""

_ROOM = 2
"""Working copies of the largest weight whose memory the kept bases of all sites may take together."""


class SpectrumCache:
    """Decomposes weights, and keeps what the rewrite will need again.

    A basis costs an eigendecomposition, and the bases of all sites together take more memory than the weights of many
    models. So the bases of one site are held while the site is looked at. Once ranks are chosen they are cut to these
    ranks, and kept until the split if there is room. A basis that found no room is computed again.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        """Allow the kept bases to take a few times the memory of the largest of some weights."""
        self.room = _ROOM * max((torch.float64.itemsize * weight.numel() for weight in weights), default=0)
        """Bytes that the kept bases may take."""
        self._kept: dict[tuple[str, str], Spectra] = {}
        self._bound = 0
        """At least the bytes of all kept bases; what is forgotten, or kept for two schemes, may count in it still."""
        self._current: tuple[tuple[str, str], Spectra] | None = None
        self._current_lowering: tuple[str, Lowering] | None = None

    def spectra(
        self, site: Site, scheme: Scheme, weights: Sequence[Tensor], ranks: tuple[int, ...] | None = None
    ) -> Spectra:
        """Return a scheme's spectra of what a site, dense or factorized, computes with now, given its parameters' values.

        With ``ranks`` they need to be right for splits up to these.
        """
        if isinstance(site.layer, Factorized):
            return self._lowering(site, site.layer, weights).spectra
        key = (site.name, scheme.name)
        if self._current is None or self._current[0] != key:
            self._current = None  # the memory of two at once would be too much
            operation, weight = site.known_operation, working_weight(site, scheme, *weights)
            self._current = (
                key,
                scheme.leading_spectra(operation, weight, ranks) if ranks else scheme.spectra(operation, weight),
            )
        return self._current[1]

    def error(self, site: Site, scheme: Scheme, ranks: tuple[int, ...], weights: Sequence[Tensor]) -> float:
        """Return the norm of what a split at some ranks loses, relative to the weight's norm."""
        if isinstance(site.layer, Factorized):
            return self._lowering(site, site.layer, weights).error(ranks)
        spectra = self._kept.get((site.name, scheme.name)) or self.spectra(site, scheme, weights, ranks)
        return scheme.error(site.known_operation, working_weight(site, scheme, *weights), ranks, spectra)

    def hold(self, site: Site, scheme: Scheme, spectra: Spectra) -> None:
        """Keep the bases of a dense site, as far as there is room; the largest stay, as they take longest to compute."""
        self._kept[site.name, scheme.name] = spectra
        self._bound += _size(spectra)
        if self._bound <= self.room:
            return
        while (size := self._size) > self.room:
            del self._kept[min(self._kept, key=lambda key: _size(self._kept[key]))]
        self._bound = size

    def keep(self, site: Site, scheme: Scheme, ranks: Sequence[int], spectra: Spectra) -> None:
        """Keep of a dense site's bases what a split at these ranks needs, if there is room; forget its other bases."""
        self.evict(site)
        reach = all(spectrum.reaches(rank) for spectrum, rank in zip(spectra, ranks, strict=True))
        if reach and not isinstance(site.layer, Factorized):
            cut = tuple(spectrum.cut(rank) for spectrum, rank in zip(spectra, ranks, strict=True))
            self._current = None
            self.hold(site, scheme, cut)

    def take(self, site: Site, scheme: Scheme) -> Spectra | None:
        """Return the kept bases of a site and forget them; None if they were not kept."""
        kept = self._kept.get((site.name, scheme.name))
        self.evict(site)
        return kept

    def evict(self, site: Site) -> None:
        """Forget the bases of a site."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] != site.name}

    @property
    def kept_sites(self) -> frozenset[str]:
        """The names of the sites whose bases are kept."""
        return frozenset(name for name, _ in self._kept)

    @property
    def _size(self) -> int:
        """Bytes of all kept bases."""
        return _size(tuple(spectrum for kept in self._kept.values() for spectrum in kept))

    def _lowering(self, site: Site, layer: Factorized, weights: Sequence[Tensor]) -> Lowering:
        """Return how a layer's factors can be split again; worked out once while the site is looked at."""
        if self._current_lowering is None or self._current_lowering[0] != site.name:
            self._current_lowering = None  # as above
            self._current_lowering = site.name, lowering_of(layer, weights, site.metric)
        return self._current_lowering[1]


def unread(full_ranks: Sequence[int]) -> Spectra:
    """Return spectra without values, for rules that use full ranks alone."""
    nothing = torch.empty(0, dtype=torch.float64)
    return tuple(Spectrum(nothing, nothing, rank, rank) for rank in full_ranks)


def _size(spectra: Spectra) -> int:
    """Return the bytes of the bases, each counted once."""
    bases = {id(spectrum.basis): spectrum.basis for spectrum in spectra}
    return sum(basis.numel() * basis.element_size() for basis in bases.values())

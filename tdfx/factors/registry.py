"""The schemes by name, and the short strings by which users ask for one."""

from __future__ import annotations

from tdfx.errors import PolicyError, nearest
from tdfx.factors.cp import Cp
from tdfx.factors.depthwise import Depthwise
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Scheme
from tdfx.factors.spatial import Spatial
from tdfx.factors.svd import Svd
from tdfx.factors.tucker import Tucker2
from tdfx.factors.tucker1 import Tucker1In, Tucker1Out

AUTO = "auto"
"""The name that leaves the choice of scheme to tdfx, site by site."""

_SCHEMES: dict[str, Scheme] = {
    one.name: one for one in (Tucker2(), Svd(), Tucker1Out(), Tucker1In(), Spatial(), Depthwise(), Cp())
}
_ALIASES = {"channel": "tucker1_out"}
"""Other names by which the literature knows a scheme."""
_AUTO = ("tucker2", "svd")
"""What ``"auto"`` tries, in this order."""


def scheme_names() -> tuple[str, ...]:
    """Return the names of all schemes.

    >>> scheme_names()
    ('tucker2', 'svd', 'tucker1_out', 'tucker1_in', 'spatial', 'depthwise', 'cp')
    """
    return tuple(_SCHEMES)


def get_scheme(name: str) -> Scheme:
    """Return a scheme by its name, or by another name of it.

    >>> get_scheme("channel").name
    'tucker1_out'

    Raises:
        PolicyError: No scheme has this name.
    """
    if not isinstance(name, str) or (name not in _SCHEMES and name not in _ALIASES):
        raise PolicyError(
            f"scheme={name!r} is not known: the schemes are {', '.join(_SCHEMES)}, or {AUTO!r} to choose for each site. "
            f"Nearest: {nearest(str(name).lower(), [*_SCHEMES, *_ALIASES], 1)}."
        )
    return _SCHEMES[_ALIASES.get(name, name)]


def scheme_for(operation: Operation, name: str = AUTO) -> Scheme | None:
    """Return the named scheme, or for ``"auto"`` the first of tucker2 and svd that fits; None if none fits the operation."""
    candidates = _AUTO if name == AUTO else (name,)
    return next((scheme for scheme in map(get_scheme, candidates) if scheme.fits(operation)), None)

"""The schemes by name, in the order in which ``scheme="auto"`` tries them."""

from __future__ import annotations

from tdfx.errors import PolicyError, nearest
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Scheme
from tdfx.factors.svd import Svd
from tdfx.factors.tucker import Tucker2

AUTO = "auto"
"""The name that leaves the choice of scheme to tdfx, site by site."""

_SCHEMES: dict[str, Scheme] = {one.name: one for one in (Tucker2(), Svd())}


def scheme_names() -> tuple[str, ...]:
    """Return the names of all schemes.

    >>> scheme_names()
    ('tucker2', 'svd')
    """
    return tuple(_SCHEMES)


def get_scheme(name: str) -> Scheme:
    """Return a scheme by its name.

    Raises:
        PolicyError: No scheme has this name.
    """
    if not isinstance(name, str) or name not in _SCHEMES:
        raise PolicyError(
            f"scheme={name!r} is not known: the schemes are {', '.join(_SCHEMES)}, or {AUTO!r} to choose for each site. "
            f"Nearest: {nearest(str(name), _SCHEMES, 1)}."
        )
    return _SCHEMES[name]


def scheme_for(operation: Operation, name: str = AUTO) -> Scheme | None:
    """Return the named scheme, or the first that fits for ``"auto"``; None if it does not fit the operation."""
    candidates = _SCHEMES.values() if name == AUTO else (get_scheme(name),)
    return next((scheme for scheme in candidates if scheme.fits(operation)), None)

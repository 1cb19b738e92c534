"""The schemes by name, and the short strings by which users ask for one."""

from __future__ import annotations

import re
from functools import lru_cache

from tdfx.errors import PolicyError, nearest
from tdfx.factors.cp import Cp
from tdfx.factors.depthwise import Depthwise
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Scheme
from tdfx.factors.spatial import Spatial
from tdfx.factors.svd import Svd
from tdfx.factors.tucker import Tucker1In, Tucker1Out, Tucker2

AUTO = "auto"
"""The name that leaves the choice of scheme to tdfx, site by site."""

_SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (Tucker2(), Svd(), Tucker1Out(), Tucker1In(), Spatial(), Depthwise(), Cp())
}
_MOST = 1000
"""The largest value of an option, which is a number of rounds: with more, tdfx would seem to hang."""
_WHOLE = re.compile(r"[0-9]{1,9}")
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
    """Return a scheme by its name or an alias, with options after a colon.

    >>> get_scheme("channel").name
    'tucker1_out'
    >>> get_scheme("tucker2:refine=3").name
    'tucker2:refine=3'

    Raises:
        PolicyError: No scheme has this name, or the scheme has no such option.
    """
    stem, colon, text = name.partition(":") if isinstance(name, str) else ("", "", "")
    if stem not in _SCHEMES and stem not in _ALIASES:
        raise PolicyError(
            f"scheme={name!r} is not known: the schemes are {', '.join(_SCHEMES)}, or {AUTO!r} to choose for each site. "
            f"Nearest: {nearest(str(name).lower(), [*_SCHEMES, *_ALIASES], 1)}."
        )
    scheme = _SCHEMES[_ALIASES.get(stem, stem)]
    return _with_options(scheme, text) if colon else scheme


@lru_cache(maxsize=256)
def _with_options(scheme: Scheme, text: str) -> Scheme:
    examples = ", ".join(f"{scheme.name}:{option}=3" for option in scheme.options)
    settings: dict[str, int] = {}
    for part in text.split(","):
        option, _, value = part.partition("=")
        if option not in scheme.options or not _WHOLE.fullmatch(value) or not 1 <= int(value) <= _MOST:
            raise PolicyError(
                f"scheme={f'{scheme.name}:{text}'!r} has the option {part!r}, which is not known: an option is a name and a "
                f"whole number from 1 to {_MOST}, and {scheme.name} takes "
                f"{examples or f'no options; write {scheme.name!r}'}."
            )
        settings[option] = int(value)
    return type(scheme)(**settings)


def scheme_for(operation: Operation, name: str = AUTO) -> Scheme | None:
    """Return the named scheme, or for ``"auto"`` the first of tucker2 and svd that fits; None if none fits the operation."""
    candidates = _AUTO if name == AUTO else (name,)
    return next((scheme for scheme in map(get_scheme, candidates) if scheme.fits(operation)), None)

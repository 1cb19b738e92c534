"""The schemes by name, and the short strings by which users ask for one."""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from typing import TypeVar

from tdfx.errors import PolicyError, nearest
from tdfx.factors.check_scheme import check_scheme
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
_BUDGET_AUTO = ("tucker2", "tucker1_out", "tucker1_in", "spatial", "svd")
"""What a budget chooses among, where the policy names no scheme."""
_BUILT_IN = frozenset({AUTO, *_SCHEMES, *_ALIASES})
SchemeT = TypeVar("SchemeT", bound=type[Scheme])


def register_scheme(scheme: SchemeT) -> SchemeT:
    """Register a scheme of your own under its name; a decorator for a subclass of ``Scheme``, or of ``TwoFactors``.

    Its name is then valid wherever a scheme is named: in policies, overrides, policy files, plans and checkpoints. A process
    that loads a plan or a checkpoint must have registered it too. With ``in_auto = True`` budgets also consider it where a
    policy names no scheme. It is tried on a few small layers first, in float64, so that a mistake does not reach a model. A
    scheme that is registered later under the same name replaces the former one.

    Raises:
        PolicyError: It is not a subclass of Scheme, lacks a method or a name, has the name of a built-in scheme, or computes
            something else than it promises.

    Example:
        >>> import tdfx, torch
        >>> @tdfx.register_scheme
        ... class InputsLast(tdfx.TwoFactors):
        ...     "A linear map as two, like ``svd``."
        ...     name = "two_maps"
        ...
        ...     def fits(self, operation):
        ...         return operation.dims == 0
        >>> policy = tdfx.Policy(scheme="two_maps", rank=tdfx.Ratio(of=0.25), min_gain=0)
        >>> tdfx.plan(torch.nn.Linear(64, 64), policy).sites[0].scheme
        'two_maps'
    """
    if not (isinstance(scheme, type) and issubclass(scheme, Scheme)):
        raise PolicyError(f"{scheme!r} is not a subclass of tdfx.Scheme. Write a class that derives from it.")
    if inspect.isabstract(scheme):
        missing = ", ".join(sorted(scheme.__abstractmethods__))
        raise PolicyError(
            f"{scheme.__name__} lacks {missing}. Define what every scheme needs, or derive it from TwoFactors."
        )
    name = getattr(scheme, "name", None)
    if not (isinstance(name, str) and name.isidentifier()):
        raise PolicyError(
            f"{scheme.__name__}.name is {name!r}, by which policies and plans shall name it. Set it to a word of letters, "
            f"digits and underscores, such as 'two_maps'."
        )
    if name in _BUILT_IN:
        raise PolicyError(f"{scheme.__name__}.name is {name!r}, the name of a built-in scheme. Give it another name.")
    try:
        instance = scheme()
    except TypeError as error:
        raise PolicyError(
            f"{scheme.__name__}() fails: {error}. Let every setting of a scheme have a default."
        ) from error
    check_scheme(instance)
    _SCHEMES[name] = instance
    return scheme


def scheme_names() -> tuple[str, ...]:
    """Return the names of all schemes.

    >>> scheme_names()[:3]
    ('tucker2', 'svd', 'tucker1_out')
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
            f"Nearest: {nearest(str(name).lower(), [*_SCHEMES, *_ALIASES], 1)}. If it is one of your own, first import the "
            f"code that calls tdfx.register_scheme for it."
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
    """Return the named scheme, or for ``"auto"`` the first of tucker2, svd and registered ones that fits; else None."""
    candidates = (*_AUTO, *_registered_in_auto()) if name == AUTO else (name,)
    return next((scheme for scheme in map(get_scheme, candidates) if scheme.fits(operation)), None)


def budget_schemes(name: str) -> tuple[Scheme, ...]:
    """Return the schemes among which a budget chooses: the named one, or for ``"auto"`` those that are considered then."""
    return tuple(map(get_scheme, (*_BUDGET_AUTO, *_registered_in_auto()) if name == AUTO else (name,)))


def _registered_in_auto() -> list[str]:
    return [name for name, scheme in _SCHEMES.items() if scheme.in_auto and name not in _BUILT_IN]

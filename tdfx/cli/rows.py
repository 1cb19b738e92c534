"""Select and sort the sites of a plan that are shown, and write them as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from fnmatch import fnmatchcase
from functools import partial

from tdfx.errors import TdfxError, nearest
from tdfx.plans.plan import Plan, Reason, SitePlan

FILTERS = ("factorized", "kept", *map(str, Reason))
"""What ``--filter`` takes besides globs."""

_Key = Callable[[SitePlan], float | None]
_KEYS: dict[str, _Key] = {
    "time": lambda site: site.seconds_before,
    "gain": lambda site: site.gain,
    "error": lambda site: site.error,
    "parameters": lambda site: site.parameters_before,
    "flops": lambda site: site.flops_before,
}
_WHY_UNKNOWN = {
    "time": "no layer was timed. Give --input, without --modelled",
    "gain": "no gain was computed. Leave out --min-gain 0",
    "error": "nothing is factorized, or the weights have no values",
    "flops": "operations depend on the sizes of the inputs. Give --input",
}


def select(plan: Plan, filters: Sequence[str], key: str) -> tuple[SitePlan, ...]:
    """Return the sites that meet all filters, in the order of ``key``: see FILTERS, and the choices of ``--sort``.

    Raises:
        TdfxError: A glob matches no site, or the quantity to sort by is not known for any.
    """
    names = [site.name for site in plan]
    for condition in filters:
        if condition not in FILTERS and not any(fnmatchcase(name, condition) for name in names):
            raise TdfxError(
                f"--filter {condition!r} matches none of the {len(names)} sites. "
                f"Nearest: {nearest(condition, [*FILTERS, *names])}. "
                f"It takes {', '.join(FILTERS[:2])}, a reason, or a glob over names."
            )
    return ordered([site for site in plan if all(_meets(site, condition) for condition in filters)], key)


def _meets(site: SitePlan, condition: str) -> bool:
    if condition in {"factorized", "kept"}:
        return site.factorized == (condition == "factorized")
    return str(site.reason) == condition if condition in FILTERS else fnmatchcase(site.name, condition)


def ordered(sites: Sequence[SitePlan], key: str) -> tuple[SitePlan, ...]:
    """Return the sites in the model's order, by name, or by a quantity: the largest first, those without it last."""
    if key == "order":
        return tuple(sites)
    if key == "name":
        return tuple(sorted(sites, key=lambda site: site.name))
    quantity = _saving(sites) if key == "saved" else _KEYS[key]
    if sites and all(quantity(site) is None for site in sites):
        raise TdfxError(f"--sort {key} has no values to sort by: {_WHY_UNKNOWN[key]}.")
    return tuple(sorted(sites, key=lambda site: (quantity(site) is None, -(quantity(site) or 0.0))))


def _saving(sites: Sequence[SitePlan]) -> _Key:
    """Return what the rewrite of a site saves: time if any site was measured, else operations, else parameters."""
    for quantity in ("seconds", "flops"):
        if any(_saved(site, quantity) is not None for site in sites):
            return partial(_saved, quantity=quantity)
    return partial(_saved, quantity="parameters")


def _saved(site: SitePlan, quantity: str) -> float | None:
    before, after = getattr(site, f"{quantity}_before"), getattr(site, f"{quantity}_after")
    return None if before is None or after is None else before - after


def to_csv(sites: Sequence[SitePlan]) -> str:
    """Return a line of titles, and a line for each site with its numbers unrounded.

    >>> site = SitePlan(name="fc", kind="Linear", shape=(4, 8), calls=1, scheme="svd", ranks=(2,), parameters_before=32,
    ...                 parameters_after=24)
    >>> to_csv([site]).splitlines()[1][:36]
    'fc,Linear,4x8,1,1,False,,svd,2,False'
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([field.name for field in fields(SitePlan)])
    for site in sites:
        table.writerow("x".join(map(str, value)) if isinstance(value, tuple) else value for value in astuple(site))
    return text.getvalue().rstrip("\n")

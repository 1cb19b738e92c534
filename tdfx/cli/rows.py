"""Select and sort the sites of a plan that are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from tdfx.errors import TdfxError, nearest
from tdfx.plans.plan import Plan, Reason, SitePlan

SORTS = ("order", "name", "time", "saved", "gain", "error", "parameters", "flops")
"""What ``--sort`` takes."""
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
    """Return the sites to show, in the order in which to show them."""
    return ordered(_filtered(plan.sites, filters), key)


def _filtered(sites: Sequence[SitePlan], filters: Sequence[str]) -> tuple[SitePlan, ...]:
    """Return the sites that meet every filter: ``factorized``, ``kept``, a reason, or a glob over names.

    Raises:
        TdfxError: A glob matches no site.
    """
    names = [site.name for site in sites]
    for condition in filters:
        if condition not in FILTERS and not any(fnmatchcase(name, condition) for name in names):
            raise TdfxError(
                f"--filter {condition!r} matches none of the {len(sites)} sites. "
                f"Nearest: {nearest(condition, [*FILTERS, *names])}. "
                f"It takes {', '.join(FILTERS[:2])}, a reason, or a glob over names."
            )
    return tuple(site for site in sites if all(_meets(site, condition) for condition in filters))


def _meets(site: SitePlan, condition: str) -> bool:
    if condition in {"factorized", "kept"}:
        return site.factorized == (condition == "factorized")
    return str(site.reason) == condition if condition in FILTERS else fnmatchcase(site.name, condition)


def ordered(sites: Sequence[SitePlan], key: str) -> tuple[SitePlan, ...]:
    """Return the sites in the model's order, by name, or by a quantity: the largest first, those without it last.

    Raises:
        TdfxError: The quantity is not known for any site.
    """
    if key == "order":
        return tuple(sites)
    if key == "name":
        return tuple(sorted(sites, key=lambda site: site.name))
    quantity = _saving(sites) if key == "saved" else _KEYS[key]
    if sites and all(quantity(site) is None for site in sites):
        raise TdfxError(f"--sort {key} has no values to sort by: {_WHY_UNKNOWN[key]}.")

    def sort_key(site: SitePlan) -> tuple[bool, float]:
        value = quantity(site)
        return value is None, -(value or 0.0)

    return tuple(sorted(sites, key=sort_key))


def _saving(sites: Sequence[SitePlan]) -> _Key:
    """Return what the rewrite of a site saves: time if any site was measured, else operations, else parameters."""
    for quantity in ("seconds", "flops"):
        if any(_saved(site, quantity) is not None for site in sites):
            return lambda site, quantity=quantity: _saved(site, quantity)  # type: ignore[misc]
    return lambda site: _saved(site, "parameters")


def _saved(site: SitePlan, quantity: str) -> float | None:
    before, after = getattr(site, f"{quantity}_before"), getattr(site, f"{quantity}_after")
    return None if before is None or after is None else before - after

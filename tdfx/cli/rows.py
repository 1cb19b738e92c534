"""Which sites of a plan are shown, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from tdfx.errors import TdfxError, nearest
from tdfx.plans.plan import Plan, Reason, SitePlan

SORTS = ("order", "name", "time", "saved", "gain", "error", "parameters", "flops")
FILTERS = ("factorized", "kept", *map(str, Reason))
"""What ``--filter`` takes beside globs."""

_Key = Callable[[SitePlan], float | None]
_KEYS: dict[str, _Key] = {
    "time": lambda one: one.seconds_before,
    "gain": lambda one: one.gain,
    "error": lambda one: one.error,
    "parameters": lambda one: one.parameters_before,
    "flops": lambda one: one.flops_before,
}
_UNKNOWN = {
    "time": "no layer was timed. Give --input, without --modelled",
    "gain": "no gain was asked for. Leave out --min-gain 0",
    "error": "nothing is factorized, or the weights have no values",
    "flops": "operations depend on what flows through the layers. Give --input",
}


def filtered(sites: Sequence[SitePlan], wishes: Sequence[str]) -> tuple[SitePlan, ...]:
    """Return the sites that meet every wish: ``factorized``, ``kept``, a reason, or a glob over names.

    Raises:
        TdfxError: A glob matches no site at all.
    """
    for wish in wishes:
        if wish not in FILTERS and not any(fnmatchcase(one.name, wish) for one in sites):
            names = [one.name for one in sites]
            raise TdfxError(
                f"--filter {wish!r} matches none of the {len(sites)} sites. Nearest: {nearest(wish, [*FILTERS, *names])}. "
                f"It takes {', '.join(FILTERS[:2])}, a reason, or a glob over names."
            )
    return tuple(one for one in sites if all(_meets(one, wish) for wish in wishes))


def _meets(site: SitePlan, wish: str) -> bool:
    if wish in {"factorized", "kept"}:
        return site.factorized == (wish == "factorized")
    return str(site.reason) == wish if wish in FILTERS else fnmatchcase(site.name, wish)


def ordered(sites: Sequence[SitePlan], key: str) -> tuple[SitePlan, ...]:
    """Return the sites in the model's order, by name, or with the largest of a quantity first and those without it last.

    Raises:
        TdfxError: The quantity is known of no site.
    """
    if key == "order":
        return tuple(sites)
    if key == "name":
        return tuple(sorted(sites, key=lambda one: one.name))
    quantity = _saving(sites) if key == "saved" else _KEYS[key]
    if sites and all(quantity(one) is None for one in sites):
        raise TdfxError(f"--sort {key} has nothing to go by: {_UNKNOWN[key]}.")

    def place(site: SitePlan) -> tuple[bool, float]:
        value = quantity(site)
        return value is None, -(value or 0.0)

    return tuple(sorted(sites, key=place))


def _saving(sites: Sequence[SitePlan]) -> _Key:
    """Return what a rewrite saves of each site: time where any was measured, else operations, else parameters."""
    for quantity in ("seconds", "flops"):
        if any(_difference(one, quantity) is not None for one in sites):
            return lambda one, quantity=quantity: _difference(one, quantity)  # type: ignore[misc]
    return lambda one: _difference(one, "parameters")


def _difference(site: SitePlan, quantity: str) -> float | None:
    before, after = getattr(site, f"{quantity}_before"), getattr(site, f"{quantity}_after")
    return None if before is None or after is None else before - after


def picked(plan: Plan, wishes: Sequence[str], key: str) -> tuple[SitePlan, ...]:
    """Return the sites to show, in the order in which to show them."""
    return ordered(filtered(plan.sites, wishes), key)

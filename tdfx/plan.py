"""What will be done to a model, site by site, and why not where not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Literal, get_args

from tdfx.errors import PlanError, nearest
from tdfx.plan_table import render_plan

Emit = Literal["graph", "modules"]
"""How a rewritten model is given back: as a ``GraphModule``, or as the same class with its sites swapped."""

_FORMAT = 1


class Reason(StrEnum):
    """Why a site is kept as it is; the list is closed, so that code can read it."""

    EXCLUDED = "excluded"
    """The policy does not want it."""
    NO_SIGNAL = "no_signal"
    """The weight shows nothing above the noise yet."""
    NO_GAIN = "no_gain"
    """By the policy's cost, factorizing would not make its training step enough faster."""
    NO_SCHEME = "no_scheme"
    """No scheme, or not the one asked for, can stand for this kind of layer."""
    FROZEN = "frozen"
    """Its weight has no gradient, so training it faster has no meaning."""
    TIED = "tied"
    """Its weight is shared with another layer."""
    READ_ELSEWHERE = "read_elsewhere"
    """Its weight is read by something other than a call of the layer."""
    PARAMETRIZED = "parametrized"
    """Its weight is computed from other tensors, as weight_norm does."""
    UNINITIALIZED = "uninitialized"
    """A lazy layer that has not seen its first input."""
    CUSTOM_FORWARD = "custom_forward"
    """A subclass that computes something else than its stock class."""
    NOT_CALLED = "not_called"
    """``forward`` never calls it."""
    FACTORIZED = "factorized"
    """It is factorized already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """The decision for one site."""

    name: str
    """Path of the layer in the model; "" for a model that is itself the layer."""
    kind: str
    """The stock class of the layer, such as ``Conv2d``."""
    shape: tuple[int, ...]
    """Shape of the weight: (out, in / groups, *kernel); () where it is not known yet."""
    calls: int
    """How many times one forward pass calls the layer, where that is known; 0 if never."""
    scheme: str | None = None
    """The scheme, or None where the site is kept."""
    ranks: tuple[int, ...] | None = None
    """One rank for each mode, or None where the site is kept."""
    full_ranks: tuple[int, ...] | None = None
    """The ranks at which nothing would be lost, where a scheme fits."""
    reason: Reason | None = None
    """Why the site is kept, or None where it is factorized."""
    note: str = ""
    """What else there is to know of the decision, in words."""
    parameters_before: int
    """Values in the dense weight."""
    parameters_after: int
    """Values in the factors, or as before where the site is kept."""
    flops_before: int | None = None
    """Floating-point operations of one forward pass, dense; None without example inputs."""
    flops_after: int | None = None
    """The same, after the rewrite."""
    gain: float | None = None
    """How many times faster the site's training step becomes, by the policy's cost; None where that was not asked."""
    error: float | None = None
    """Frobenius norm of what the split loses, relative to the weight's; None where the site is kept."""

    def __post_init__(self) -> None:
        if (self.scheme is None) != (self.ranks is None) or (self.scheme is None) == (self.reason is None):
            raise PlanError(
                f"Site {self.name!r} has scheme={self.scheme!r}, ranks={self.ranks!r} and reason={self.reason!r}: a site "
                f"is either factorized, with a scheme and ranks, or kept, with a reason."
            )

    @property
    def factorized(self) -> bool:
        """True if the site will be rewritten."""
        return self.scheme is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decisions for every site of one model; printing it shows a table."""

    sites: tuple[SitePlan, ...]
    """Every convolution and linear layer of the model, in the order of the state_dict."""
    emit: Emit = "graph"
    """How the rewritten model will be given back."""
    notes: tuple[str, ...] = ()
    """What concerns the whole model, such as why it cannot be given back as a graph."""
    model: str = ""
    """The class of the model."""
    policy: str = ""
    """The policy, as it prints itself; for the record only."""
    other_parameters: int = 0
    """Parameters of the model that belong to no site's weight: biases, norms, embeddings."""

    def __iter__(self) -> Iterator[SitePlan]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> SitePlan:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"no site {name!r} in this plan. Nearest: {nearest(name, [site.name for site in self.sites])}")

    @property
    def factorized(self) -> tuple[SitePlan, ...]:
        """The sites that will be rewritten."""
        return tuple(site for site in self.sites if site.factorized)

    @property
    def kept(self) -> tuple[SitePlan, ...]:
        """The sites that stay as they are, each with its reason."""
        return tuple(site for site in self.sites if not site.factorized)

    @property
    def parameters_before(self) -> int:
        """Parameters of the whole model now."""
        return self.other_parameters + sum(site.parameters_before for site in self.sites)

    @property
    def parameters_after(self) -> int:
        """Parameters of the whole model after the rewrite."""
        return self.other_parameters + sum(site.parameters_after for site in self.sites)

    @property
    def flops_before(self) -> int | None:
        """Forward operations of all sites that are called; None without example inputs."""
        return _total([site.flops_before for site in self.sites if site.calls])

    @property
    def flops_after(self) -> int | None:
        """The same, after the rewrite."""
        return _total([site.flops_after for site in self.sites if site.calls])

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the plan as JSON text, from which ``from_json`` makes an equal plan."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: The text is not JSON, is of a newer format, or lacks or invents a field.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(
                f"This is not a plan: it is not JSON ({error}). Pass the text that Plan.to_json gave."
            ) from error
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found != _FORMAT:
            raise PlanError(
                f"This plan has format {found!r}, and this tdfx reads format {_FORMAT}: it is no plan, or another version "
                f"wrote it. Write it again with Plan.to_json of this version."
            )
        return _read_plan(data)

    def __str__(self) -> str:
        return render_plan(self)


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


def _read_plan(data: dict[str, Any]) -> Plan:
    try:
        sites = tuple(_read_site(one) for one in data.pop("sites"))
        plan = Plan(**{**data, "sites": sites, "notes": tuple(data.get("notes", ()))})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(
            f"This plan cannot be read: {error}. Its fields are those of tdfx.Plan and tdfx.SitePlan; pass the text "
            f"that Plan.to_json gave, unchanged."
        ) from error
    if plan.emit not in get_args(Emit):
        raise PlanError(f"This plan says emit={plan.emit!r}, which is not one of {', '.join(get_args(Emit))}.")
    return plan


def _read_site(data: dict[str, Any]) -> SitePlan:
    tuples = {"shape", "ranks", "full_ranks"}
    known = {field.name for field in fields(SitePlan)}
    if unknown := set(data) - known:
        raise PlanError(
            f"Site {data.get('name')!r} has the unknown field {min(unknown)!r}. Nearest: {nearest(min(unknown), known)}."
        )
    values: dict[str, Any] = {
        key: _whole_numbers(key, one) if key in tuples and one is not None else one for key, one in data.items()
    }
    reason = data.get("reason")
    return SitePlan(**{**values, "reason": Reason(reason) if reason is not None else None})


def _whole_numbers(key: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, list) or any(not isinstance(one, int) or isinstance(one, bool) for one in given):
        raise PlanError(f"{key}={given!r} is not a list of whole numbers.")
    return tuple(given)

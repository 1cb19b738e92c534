"""What will be done to a model, site by site, and why not where not."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tdfx.errors import PlanError, nearest
from tdfx.plans.table import render_plan

if TYPE_CHECKING:
    from torch import nn

    from tdfx.passes.analysis.observe import Inputs
    from tdfx.training.step_check import StepCheck

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
    """By the policy's cost, factorizing at the chosen ranks would not make its training step enough faster."""
    TOO_SMALL = "too_small"
    """By the policy's cost, not even the lowest ranks would."""
    NOT_NEEDED = "not_needed"
    """The policy's budget is kept at less loss without it."""
    NO_SCHEME = "no_scheme"
    """No scheme, or not the one asked for, can stand for this kind of layer."""
    FROZEN = "frozen"
    """Its weight has no gradient, so training it faster has no meaning."""
    TIED = "tied"
    """Its weight is shared with another module."""
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
    """It is factorized already, and the policy asks for no lower ranks, or for another scheme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """The decision for one site."""

    name: str
    """Path of the layer in the model, "" for a model that is itself the layer; or path of the parameter."""
    kind: str
    """The layer kind, such as ``Conv2d``, or a function, such as ``F.linear``."""
    shape: tuple[int, ...]
    """Shape of the weight in torch's layout, (out, in / groups, *kernel) or transposed (in, out / groups, *kernel); () where
    it is not known yet."""
    calls: int
    """How many times one forward pass calls the layer, where that is known; 0 if never."""
    groups: int = 1
    """Blocks of channels that do not see one another."""
    transposed: bool = False
    """True for a transposed convolution."""
    parameter: str | None = None
    """Path of the parameter that functions take as their weight, where the site is such calls; None for a layer."""
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
    """Values in the weight, or in the factors of a site that is factorized already."""
    parameters_after: int
    """Values in the factors, or as before where the site is kept."""
    flops_before: int | None = None
    """Floating-point operations of one forward pass as the site is now; None without example inputs."""
    flops_after: int | None = None
    """The same, after the rewrite."""
    memory_before: int | None = None
    """Bytes that the site adds to a training step as it is now: weights, gradients, two moments, and what its factors hand
    on; None without example inputs."""
    memory_after: int | None = None
    """The same, after the rewrite."""
    seconds_before: float | None = None
    """Measured time of the site's training step as it is now, over all its calls; None where it was not measured."""
    seconds_after: float | None = None
    """The same, after the rewrite."""
    estimated: bool = False
    """True if ``seconds_after``, or both, were not measured for want of time, but estimated in the scale of what was."""
    gain: float | None = None
    """How many times faster the site's training step becomes, by the policy's cost; None where that was not asked."""
    error: float | None = None
    """Frobenius norm of what the split loses, relative to that of the weight as it is now; None where the site is kept,
    or where its weight lies on the meta device and has no values."""

    def __post_init__(self) -> None:
        if (self.scheme is None) != (self.ranks is None) or (self.scheme is None) == (self.reason is None):
            raise PlanError(
                f"Site {self.name!r} has scheme={self.scheme!r}, ranks={self.ranks!r} and reason={self.reason!r}: a site "
                f"is either factorized, with a scheme and ranks, or kept, with a reason."
            )
        if self.groups < 1:
            raise PlanError(
                f"Site {self.name!r} has groups={self.groups}: there is at least one, and 1 for a linear map."
            )

    @property
    def factorized(self) -> bool:
        """True if the site will be rewritten."""
        return self.scheme is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The decisions for every site of one model; printing it shows a table."""

    sites: tuple[SitePlan, ...]
    """Every convolution and linear layer, and every parameter used as one's weight, in the order of the state_dict."""
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
    step_seconds: float | None = None
    """Measured time of the model's training step as it is now; None where it was not measured."""

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

    @property
    def memory_before(self) -> int | None:
        """Bytes that all sites that are called add to a training step; None without example inputs."""
        return _total([site.memory_before for site in self.sites if site.calls])

    @property
    def memory_after(self) -> int | None:
        """The same, after the rewrite."""
        return _total([site.memory_after for site in self.sites if site.calls])

    @property
    def step_seconds_after(self) -> float | None:
        """Predicted time of the model's training step after the rewrite; None where the step was not measured."""
        return None if self.step_seconds is None else self.predicted_seconds(self.step_seconds)

    def predicted_seconds(self, step_seconds: float) -> float:
        """Return how long a training step is predicted to take after the rewrite, in seconds.

        Args:
            step_seconds: How long it takes now. What of it is not the time of sites stays.
        """
        timed = [(one.seconds_before, one.seconds_after) for one in self.sites]
        known = [(before, after) for before, after in timed if before is not None and after is not None]
        alone = sum(before for before, _ in known)
        return step_seconds - part_of_step(alone, step_seconds) * sum(before - after for before, after in known)

    @property
    def speedup(self) -> float | None:
        """How many times faster the model's training step is predicted to be; None where it was not measured."""
        after = self.step_seconds_after
        return None if self.step_seconds is None or after is None else self.step_seconds / after

    @property
    def total_error(self) -> float:
        """The squares of the sites' errors, summed: what a budget keeps as small as it can."""
        return sum(one.error * one.error for one in self.sites if one.error is not None)

    def check(self, model: nn.Module, *, example_inputs: Inputs, **settings: Any) -> StepCheck:
        """Time the real training step before and after the rewrite, and say how good the prediction was.

        Args:
            model: What ``rewrite`` made by this plan.
            example_inputs: As for ``plan``.
            settings: As for ``tdfx.training.step_check.check_step``: ``dense``, ``optimizer``, ``autocast``, ``rounds``.

        Raises:
            PlanError: The plan has no measured times.
        """
        from tdfx.training.step_check import check_step

        return check_step(self, model, example_inputs=example_inputs, **settings)

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
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(
                f"This is not a plan: it is not JSON ({error}). Pass the text that Plan.to_json gave."
            ) from error
        found = data.pop("format", None) if isinstance(data, dict) else None
        if type(found) is not int or found != _FORMAT:
            raise PlanError(
                f"This plan has format {found!r}, and this tdfx reads format {_FORMAT}: it is no plan, or another version "
                f"wrote it. Write it again with Plan.to_json of this version."
            )
        if not isinstance(data.get("sites"), list):
            raise PlanError("This plan has no list of 'sites'. Pass the text that Plan.to_json gave, unchanged.")
        sites = tuple(_read(SitePlan, one) for one in data["sites"])
        return _read(Plan, {**data, "sites": sites})

    def __str__(self) -> str:
        return render_plan(self)


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


Record = TypeVar("Record", Plan, SitePlan)


def _read(kind: type[Record], data: object) -> Record:
    """Build a record from what JSON gave, every field held to its declared type.

    Raises:
        PlanError: A field is unknown, missing, or of another type.
    """
    if not isinstance(data, dict):
        raise PlanError(f"{data!r} is no {kind.__name__}: it is a mapping of its fields.")
    hints = get_type_hints(kind)
    owner = f"Site {data.get('name')!r}" if kind is SitePlan else "The plan"
    if unknown := sorted(set(data) - set(hints)):
        raise PlanError(f"{owner} has the unknown field {unknown[0]!r}. Nearest: {nearest(unknown[0], hints)}.")
    values: dict[str, Any] = {}
    for key, value in data.items():
        for choice in get_args(hints[key]) if get_origin(hints[key]) is types.UnionType else (hints[key],):
            if _fits(value, choice):
                values[key] = tuple(value) if isinstance(value, list) else Reason(value) if choice is Reason else value
                break
        else:
            raise PlanError(
                f"{owner} has {key}={value!r}, which is not {_in_words(hints[key])}. Pass the text that Plan.to_json gave, "
                f"unchanged."
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise PlanError(f"{owner} is incomplete: {error}. Pass the text that Plan.to_json gave, unchanged.") from error


def _fits(value: object, kind: Any) -> bool:
    """Return True if JSON's value is of a declared type."""
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is_a(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is Reason:
        return isinstance(value, str) and value in set(Reason)
    return _is_a(value, kind)


def _is_a(value: object, kind: type[object]) -> bool:
    """Return True for a value of a JSON type: a bool is no number, and a whole number of 64 bits is a float too."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, int) and abs(value) >= 2**63:
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


_WORDS = {
    int: "a whole number below 2**63",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
}

_MANY = {int: "whole numbers below 2**63", str: "texts"}


def _in_words(hint: Any) -> str:
    """Return a declared type as a person would say it.

    >>> _in_words(tuple[int, ...] | None)
    'a list of whole numbers below 2**63 or null'
    """
    if get_origin(hint) is types.UnionType:
        return " or ".join(_in_words(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_MANY.get(get_args(hint)[0], 'sites')}"
    known = Reason if hint is Reason else get_args(hint)
    return f"one of {', '.join(known)}" if known else _WORDS[hint]


def part_of_step(alone: float, step: float) -> float:
    """Return how much of their time by themselves sites take in a step: all of it, unless that were longer than the step.

    Args:
        alone: Time of all sites, each by itself.
        step: Time of the step, in the same unit.

    >>> part_of_step(0.5, 1.0), part_of_step(2.0, 1.0)
    (1.0, 0.5)
    """
    return min(1.0, step / alone) if alone > 0 else 1.0

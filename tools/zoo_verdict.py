"""The results of the zoo's checks, and the comparisons that they are made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from zoo_account import Account
from zoo_compare import Gap, gap_of, largest_norm, norm_and_deviation
from zoo_run import Observation

from tdfx.checks import read_record

CHECKS = ("accounted", "full_train", "full_eval", "gradients", "control", "merge", "untouched")
"""The checks, in the order in which they run."""
Figures = dict[str, float | int | str]


@dataclass(slots=True)
class ZooCheck:
    """The result of one check."""

    ok: bool | None
    """None where the check does not apply, as the detail says."""
    figures: Figures = field(default_factory=dict)
    detail: str = ""


@dataclass(slots=True)
class Verdict:
    """The results for one model."""

    model: str
    checks: dict[str, ZooCheck] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """The error that ended the examination as a whole; "" for none."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True if every parameter is accounted for and no check failed."""
        accounted_for = self.checks.get("accounted", ZooCheck(None)).ok
        return not self.error and bool(accounted_for) and all(check.ok is not False for check in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict for JSON; infinity, which JSON lacks, becomes text."""
        return {"ok": self.ok, **_for_json(asdict(self))}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        """Return a verdict from what ``to_dict`` returned."""
        return read_record(cls, {key: value for key, value in data.items() if key != "ok"})


def accounted(account: Account, sites: Iterable[Any]) -> ZooCheck:
    """Check that every parameter that data are multiplied by belongs to a site, and that each kept site has a reason."""
    listed = list(sites)
    missed = account.missed(listed)
    silent = [site.name for site in listed if not getattr(site, "factorized", True) and site.reason is None]
    titled = {"not accounted for": missed, "kept without a reason": silent}
    complaints = [f"{title}: {', '.join(names)}" for title, names in titled.items() if names]
    figures: Figures = {"parameters": len(account.names), "missed": len(missed)}
    return ZooCheck(not complaints, figures, "; ".join(complaints))


def same_runs(reference: Observation, observation: Observation, response: Mapping[str, float]) -> ZooCheck:
    """Compare a run with the original's: what the model returns, and its buffers."""
    if reference.structure != observation.structure:
        detail = f"returns {observation.structure[:200]}, not {reference.structure[:200]}"
        return ZooCheck(False, {"share": "inf"}, detail)
    gap = gap_of(reference.outputs, observation.outputs, response)
    if not gap.compared:
        return ZooCheck(False, {"share": "inf"}, f"every output changes under rounding: {', '.join(gap.unstable)}")
    return check_of(gap.combine(gap_of(reference.buffers, observation.buffers, response, norm_and_deviation)))


def same_gradients(reference: Observation, observation: Observation, response: Mapping[str, float]) -> ZooCheck:
    """Compare the gradients of the inputs and of what was not factorized with the original's."""
    gap = gap_of(reference.gradients, observation.gradients, response, largest_norm)
    return check_of(gap) if gap.compared else ZooCheck(False, {}, "no gradient could be compared")


def check_of(gap: Gap) -> ZooCheck:
    """Return the check that a gap is within the tolerance."""
    details = [f"{gap.where}: {gap.share:.2g} times the tolerance"] if gap.share > 1 else []
    if gap.unstable:
        details.append(f"not compared, because rounding alone changes it: {', '.join(gap.unstable)}")
    return ZooCheck(gap.share <= 1, figures_of(gap), "; ".join(details))


def figures_of(gap: Gap) -> Figures:
    """Return a gap as figures."""
    return {**asdict(gap), "unstable": len(gap.unstable)}


def architecture_difference(original: nn.Module, merged: nn.Module, fresh: nn.Module) -> str:
    """Return how a merged model differs from its original, or "": class, keys, order, shapes, dtypes, loading."""
    if type(merged) is not type(original):
        return f"merged to {type(merged).__name__}, not {type(original).__name__}"
    entries, expected = (
        [(key, value.shape, value.dtype) for key, value in model.state_dict().items()] for model in (merged, original)
    )
    if entries != expected:
        different = next((pair for pair in zip(entries, expected, strict=False) if pair[0] != pair[1]), "their number")
        return f"the state_dict differs: {different}"
    try:
        fresh.load_state_dict(merged.state_dict(), strict=True)
    except RuntimeError as error:
        return describe_error(error)
    return ""


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Return everything about a model that must not change."""
    return {
        "class": type(model),
        "values": [(key, _digest(value)) for key, value in model.state_dict().items()],
        "parameters": [id(parameter) for parameter in model.parameters()],
        "modes": [(name, type(module), module.training) for name, module in model.named_modules()],
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
    }


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def untouched(before: dict[str, object], after: dict[str, object]) -> ZooCheck:
    """Compare two fingerprints of a model."""
    changed = [key for key in before if before[key] != after[key]]
    return ZooCheck(not changed, {"changed": len(changed)}, f"changed: {', '.join(changed)}" if changed else "")


def describe_error(error: Exception) -> str:
    """Return an error's class and message."""
    return f"{type(error).__name__}: {error}"[:2000]


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

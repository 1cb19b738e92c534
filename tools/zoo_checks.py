"""The checks that every model of the zoo goes through, and the verdict that they add up to."""

from __future__ import annotations

import gc
import hashlib
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from zoo_account import Account, account
from zoo_inputs import Example, example_for
from zoo_run import Gap, Seen, Widened, gap_of, largest, observe, preserved, rounding_response, spread, stir, warm_up

import tdfx
from tdfx.cli.references import build_model
from tdfx.errors import TdfxWarning
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.program import PLAN_ATTRIBUTE, Program

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)

CONTROL = 100.0
"""How many times the tolerance a quarter of the ranks must move the output by."""
CHECKS = ("accounted", "full_train", "full_eval", "gradients", "control", "merge", "untouched")
"""The checks, in the order in which they run."""
GIBIBYTE = float(2**30)


@dataclass(slots=True)
class Check:
    """What one check found."""

    ok: bool | None
    """None where it does not apply, as the detail says."""
    figures: dict[str, float | int | str] = field(default_factory=dict)
    detail: str = ""


@dataclass(slots=True)
class Verdict:
    """Everything that is said of one model."""

    model: str
    checks: dict[str, Check] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """What stopped the examination as a whole."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True if every parameter is accounted for and no check failed."""
        passed = self.checks.get("accounted", Check(None)).ok
        return not self.error and bool(passed) and all(one.ok is not False for one in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it; infinity, which JSON lacks, as text."""
        return {"ok": self.ok, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Verdict:
        """Read it back."""
        values = {key: value for key, value in data.items() if key != "ok"}
        return cls(**{**values, "checks": {name: Check(**one) for name, one in data["checks"].items()}})


def examine(reference: str, given: tuple[Tensor, ...] = (), memory: float = 12.0) -> Verdict:
    """Build a model and put it through every check; whatever goes wrong becomes part of the verdict.

    Args:
        reference: What ``tdfx.cli.references.build_model`` takes.
        given: Inputs for a model that does not say its own.
        memory: GiB that the examination may take, by its own estimate.
    """
    verdict = Verdict(reference)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.manual_seed(0)
            model = build_model(reference)
            stir(model)
            _Examination(verdict, model, example_for(reference, model, given), memory).run()
        except (
            Exception
        ) as error:  # a model, its factory or tdfx may raise anything, and the next model must have its turn
            verdict.error = _words(error)
    spoken = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, TdfxWarning))
    verdict.facts["warnings"] = list(spoken)
    verdict.seconds = time.perf_counter() - started
    gc.collect()
    return verdict


def accounted(found: Account, sites: Iterable[Any]) -> Check:
    """Hold what a model multiplied its data by to the sites of a plan; each kept site must say why."""
    listed = list(sites)
    missed = found.missed(listed)
    mute = [one.name for one in listed if not getattr(one, "factorized", True) and one.reason is None]
    names = f"not accounted for: {', '.join(missed)}" if missed else ""
    silent = f"kept without a reason: {', '.join(mute)}" if mute else ""
    figures: dict[str, float | int | str] = {"parameters": len(found.names), "missed": len(missed)}
    return Check(not missed and not mute, figures, "; ".join(filter(None, (names, silent))))


def same_runs(reference: Seen, found: Seen, response: Mapping[str, float]) -> Check:
    """Hold a run of a model that should agree to the original's: what it returns, and its buffers."""
    if reference.structure != found.structure:
        return Check(False, {"share": "inf"}, f"returns {found.structure[:200]}, not {reference.structure[:200]}")
    gap = gap_of(reference.outputs, found.outputs, response)
    if not gap.compared:
        return Check(False, {"share": "inf"}, f"every output jumps under rounding: {', '.join(gap.unstable)}")
    return _judged(gap.and_also(gap_of(reference.buffers, found.buffers, response, spread)))


def same_gradients(reference: Seen, found: Seen, response: Mapping[str, float]) -> Check:
    """Hold the gradients of the inputs and of what was not factorized to the original's."""
    gap = gap_of(reference.gradients, found.gradients, response, largest)
    return _judged(gap) if gap.compared else Check(False, {}, "no gradient could be compared")


def same_architecture(original: nn.Module, merged: nn.Module, fresh: nn.Module) -> str:
    """Return what a merged model has that its original had not, or "": class, keys, order, shapes, dtypes, loading."""
    if type(merged) is not type(original):
        return f"merged to {type(merged).__name__}, not {type(original).__name__}"
    described, expected = (
        [(key, one.shape, one.dtype) for key, one in model.state_dict().items()] for model in (merged, original)
    )
    if described != expected:
        odd = next((one for one in zip(described, expected, strict=False) if one[0] != one[1]), "their number")
        return f"the state_dict differs: {odd}"
    try:
        fresh.load_state_dict(merged.state_dict(), strict=True)
    except RuntimeError as error:
        return _words(error)
    return ""


class _Examination:
    """One model on its way through the checks."""

    def __init__(self, verdict: Verdict, model: nn.Module, example: Example, memory: float) -> None:
        self.verdict = verdict
        self.model = model
        self.account = account(model, example)
        self.dtype, self.gradients, needed = _precision(model, self.account, memory)
        self.example = example.cast(self.dtype or torch.float32)
        verdict.facts |= {
            "inputs": str(example.eval),
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else "structure only",
            "parameters": sum(one.numel() for one in model.parameters()),
            "estimated_gib": round(needed, 2),
        }

    def run(self) -> None:
        """Run the checks one after the other; one that raises has failed, and the next one runs."""
        if self.dtype is None:
            self._structure_only()
            return
        with Widened() if self._settle() else nullcontext():
            self._all_checks()

    def _all_checks(self) -> None:
        before = _fingerprint(self.model)
        self._time_planning()
        self._full_rank()
        gc.collect()
        self._low_rank()
        self._check("untouched", lambda: _untouched(before, _fingerprint(self.model)))

    def _settle(self) -> bool:
        """Bring the model to its dtype and to real statistics, and say whether float32 in its code must be widened."""
        self.model.to(self.dtype)
        try:
            warm_up(self.model, self.example.train)
            self._run(self.model, False)
            return False
        except RuntimeError as error:
            if self.dtype is torch.float32:
                raise
            self.verdict.facts["dtype_note"] = f"float32 in its code is read as float64: {_words(error)}"
        with Widened():
            warm_up(self.model, self.example.train)
        return True

    def _check(self, name: str, look: Callable[[], Check]) -> None:
        try:
            self.verdict.checks[name] = look()
        except Exception as error:  # as in examine: the failure is the finding
            self.verdict.checks[name] = Check(False, {}, _words(error))

    def _attempt(self, names: Iterable[str], make: Callable[[], nn.Module]) -> nn.Module | None:
        """Return what tdfx makes, or let every check that needs it fail with what tdfx raised."""
        try:
            return make()
        except Exception as error:  # as in examine
            for name in names:
                self.verdict.checks[name] = Check(False, {}, _words(error))
            return None

    def _structure_only(self) -> None:
        sites = Find()(Trace()(Program(module=self.model)).program).program.sites
        self.verdict.facts["sites"] = len(sites)
        self._check("accounted", lambda: accounted(self.account, sites))
        for name in CHECKS[1:]:
            self.verdict.checks[name] = Check(None, {}, "not run: the estimate is above --memory even in float32")

    def _time_planning(self) -> None:
        """Time what a plan takes besides the decompositions."""
        started = time.perf_counter()
        try:
            traced = Trace()(Program(module=self.model)).program
            ObserveInputs(self.example.eval.example())(Find()(traced).program)
        except Exception as error:  # the checks that follow will say the same
            self.verdict.facts["planning_error"] = _words(error)
        self.verdict.facts["planning_s"] = round(time.perf_counter() - started, 3)

    def _full_rank(self) -> None:
        inputs = self.example.eval.example()
        made = self._attempt(CHECKS[:4], lambda: tdfx.rewrite(self.model, FULL, example_inputs=inputs))
        full = made if made is not None else self.model
        shared = {id(one) for one in full.parameters()}
        self.wanted = {
            name: one for name, one in self.model.named_parameters() if id(one) in shared and one.requires_grad
        }
        self.reference = self._runs(self.model, self.wanted)
        self.response = rounding_response(self.model, self.reference, self.account.names, self._runs_of_copy)
        if made is None:
            return
        plan = getattr(made, PLAN_ATTRIBUTE, None) or tdfx.plan(self.model, FULL, example_inputs=inputs)
        self.verdict.facts |= _facts_of(plan)
        self._check("accounted", lambda: accounted(self.account, plan))
        self._compare_full(made)

    def _compare_full(self, full: nn.Module) -> None:
        self._check("full_train", lambda: self._same(full, True))
        self._check("full_eval", lambda: self._same(full, False))
        self._check("gradients", lambda: self._same_gradients(full))

    def _same(self, full: nn.Module, mode: bool) -> Check:
        key = "train" if mode else "eval"
        return same_runs(self.reference[key], self._run(full, mode), self.response[key])

    def _same_gradients(self, full: nn.Module) -> Check:
        if not self.gradients:
            return Check(None, {}, "not run: the estimate with gradients is above --memory")
        return same_gradients(self.reference["train"], self._run(full, True, self.wanted), self.response["train"])

    def _low_rank(self) -> None:
        inputs = self.example.eval.example()
        low = self._attempt(CHECKS[4:6], lambda: tdfx.rewrite(self.model, LOW, example_inputs=inputs))
        if low is not None:
            self._check("control", lambda: self._control(low))
            self._check("merge", lambda: self._merge(low))

    def _control(self, low: nn.Module) -> Check:
        if not any(isinstance(one, tdfx.Factorized) for one in low.modules()):
            return Check(None, {}, "no site is factorized, so there is nothing to see")
        reference, found = self.reference["train"], self._run(low, True)
        gap = gap_of(reference.outputs, found.outputs, self.response["train"])
        return Check(gap.share >= CONTROL, _figures(gap), "" if gap.share >= CONTROL else "a low rank changes nothing")

    def _merge(self, low: nn.Module) -> Check:
        with preserved(low, False):
            warm_up(low, self.example.train)
            merged = tdfx.merge(low)
            fresh = build_model(self.verdict.model).to(self.dtype)
            if odd := same_architecture(self.model, merged, fresh):
                return Check(False, {}, odd)
            del fresh
            reference = {"eval": self._run(merged, False)}
            response = rounding_response(
                merged, reference, self.account.names, lambda moved: {"eval": self._run(moved, False)}
            )
            return same_runs(reference["eval"], self._run(low, False), response["eval"])

    def _runs(self, model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> dict[str, Seen]:
        return {"train": self._run(model, True, wanted if self.gradients else None), "eval": self._run(model, False)}

    def _runs_of_copy(self, moved: nn.Module) -> dict[str, Seen]:
        own = dict(moved.named_parameters())
        return self._runs(moved, {name: own[name] for name in self.wanted})

    def _run(self, model: nn.Module, mode: bool, wanted: Mapping[str, nn.Parameter] | None = None) -> Seen:
        call = self.example.train if mode else self.example.eval
        return observe(model, call, mode=mode, wanted=wanted, watched=self.example.watched)


def _precision(model: nn.Module, found: Account, memory: float) -> tuple[torch.dtype | None, bool, float]:
    """Return the dtype to examine a model in, whether with gradients, and the GiB that takes by estimate.

    Beside the original there are, at full rank, its factors; then either the eigenvectors, always in float64, or a copy with
    moved weights; and what the forward computes, of which a backward holds up to all, and as much again in gradients.
    """
    weights = [one for name, one in model.named_parameters() if name in set(found.names) and one.dim() > 1]
    own = sum(one.numel() for one in model.parameters()) + sum(one.numel() for one in model.buffers())
    factors, vectors = (
        sum(counts) for counts in zip((0, 0), *(_full_rank_counts(one) for one in weights), strict=True)
    )
    ladder: list[tuple[torch.dtype, bool]] = [(torch.float64, True), (torch.float32, True), (torch.float32, False)]
    needed = math.inf
    for dtype, gradients in ladder:
        size = torch.finfo(dtype).bits // 8
        computed = found.bytes * size // 4 * (2 if gradients else 0.25)
        needed = (size * (own + factors) + max(8 * vectors, size * own) + computed) / GIBIBYTE
        if needed <= memory:
            return dtype, gradients, needed
    return None, False, needed


def _full_rank_counts(weight: Tensor) -> tuple[int, int]:
    """Return how many values the full-rank factors of a weight have, and how many its eigenvectors."""
    rows, cols = weight.shape[0], weight.shape[1]
    taps = weight[0, 0].numel()
    if taps == 1:
        short = min(rows, cols)
        return short * (rows + cols), short * short
    return weight.numel() + rows * rows + cols * cols, rows * rows + cols * cols


def _fingerprint(model: nn.Module) -> dict[str, object]:
    """Return everything of a model that must not change."""
    return {
        "class": type(model),
        "values": [(key, _digest(one)) for key, one in model.state_dict().items()],
        "parameters": [id(one) for one in model.parameters()],
        "modes": [(name, type(one), one.training) for name, one in model.named_modules()],
        "gradients": [name for name, one in model.named_parameters() if one.grad is not None],
    }


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def _untouched(before: dict[str, object], after: dict[str, object]) -> Check:
    changed = [key for key in before if before[key] != after[key]]
    return Check(not changed, {"changed": len(changed)}, f"changed: {', '.join(changed)}" if changed else "")


def _facts_of(plan: tdfx.Plan) -> dict[str, Any]:
    return {
        "sites": len(plan),
        "factorized": len(plan.factorized),
        "kept": dict(Counter(str(one.reason) for one in plan.kept)),
        "emit": plan.emit,
        "notes": list(plan.notes),
    }


def _judged(gap: Gap) -> Check:
    parts = [f"{gap.where}: {gap.share:.2g} times the tolerance"] if gap.share > 1 else []
    parts += [f"not compared, since rounding alone moves it: {', '.join(gap.unstable)}"] if gap.unstable else []
    return Check(gap.share <= 1, _figures(gap), "; ".join(parts))


def _figures(gap: Gap) -> dict[str, float | int | str]:
    return {
        "share": gap.share,
        "relative": gap.relative,
        "where": gap.where,
        "compared": gap.compared,
        "unstable": len(gap.unstable),
    }


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

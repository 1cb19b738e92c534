"""Examine a model of the zoo: build it, rewrite and merge it, and run every check."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

import torch
import zoo_verdict
from torch import Tensor, nn
from zoo_account import Account, account
from zoo_compare import gap_of, rounding_response
from zoo_inputs import ModelExample, example_for
from zoo_run import Float64Constants, Observation, add_noise_to_constants, observe, preserved, warm_up
from zoo_verdict import CHECKS, Verdict, ZooCheck, describe_error

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
"""How many times the tolerance a quarter of the ranks must change the output by."""
GIBIBYTE = float(2**30)


def examine(reference: str, given: tuple[Tensor, ...] = (), memory: float = 12.0) -> Verdict:
    """Build a model from what ``build_model`` takes, and run every check; errors become part of the verdict.

    ``given`` are inputs for a model that has none of its own, and ``memory`` the most GiB, by estimate, that this may take.
    """
    verdict = Verdict(reference)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.manual_seed(0)
            model = build_model(reference)
            add_noise_to_constants(model)
            _Examination(verdict, model, example_for(reference, model, given), memory).run()
        except Exception as error:  # a model, its factory or tdfx may raise anything; the next model must still run
            verdict.error = describe_error(error)
    messages = (str(warning.message) for warning in caught if issubclass(warning.category, TdfxWarning))
    verdict.facts["warnings"] = list(dict.fromkeys(messages))
    verdict.seconds = time.perf_counter() - started
    gc.collect()
    return verdict


class _Examination:
    """The examination of one model."""

    def __init__(self, verdict: Verdict, model: nn.Module, example: ModelExample, memory: float) -> None:
        self.verdict = verdict
        self.model = model
        self.account = account(model, example)
        self.dtype, self.with_gradients, needed = affordable_precision(model, self.account, memory)
        self.example = example.cast(self.dtype or torch.float32)
        verdict.facts |= {
            "inputs": str(example.eval),
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else "structure only",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "estimated_gib": round(needed, 2),
        }

    def run(self) -> None:
        """Run the checks one after the other; a check that raises has failed, and the next one runs."""
        if self.dtype is None:
            self._check_structure()
            return
        with Float64Constants() if self._prepare() else nullcontext():
            before = zoo_verdict.fingerprint(self.model)
            self._time_planning()
            self._check_full_rank()
            gc.collect()
            self._check_low_rank()
            self._check("untouched", lambda: zoo_verdict.untouched(before, zoo_verdict.fingerprint(self.model)))

    def _prepare(self) -> bool:
        """Cast the model and give it real statistics; return True if float32 in its code must be replaced."""
        self.model.to(self.dtype)
        try:
            warm_up(self.model, self.example.train)
            self._observe(self.model, False)
            return False
        except RuntimeError as error:
            if self.dtype is torch.float32:
                raise
            self.verdict.facts["dtype_note"] = f"float32 in its code is read as float64: {describe_error(error)}"
        with Float64Constants():
            warm_up(self.model, self.example.train)
        return True

    def _check(self, name: str, run: Callable[[], ZooCheck]) -> None:
        try:
            self.verdict.checks[name] = run()
        except Exception as error:  # as in examine: the error is the result
            self.verdict.checks[name] = ZooCheck(False, {}, describe_error(error))

    def _rewrite(self, policy: tdfx.Policy, checks: Iterable[str]) -> nn.Module | None:
        """Return the rewritten model; if tdfx raises an error, every check that needs the model fails with it."""
        try:
            return tdfx.rewrite(self.model, policy, example_inputs=self.example.eval.example())
        except Exception as error:  # as in examine
            self.verdict.checks |= dict.fromkeys(checks, ZooCheck(False, {}, describe_error(error)))
            return None

    def _check_structure(self) -> None:
        sites = Find()(Trace()(Program(module=self.model)).program).program.sites
        self.verdict.facts["sites"] = len(sites)
        self._check("accounted", lambda: zoo_verdict.accounted(self.account, sites))
        not_run = ZooCheck(None, {}, "not run: the estimate is above --memory even in float32")
        self.verdict.checks |= dict.fromkeys(CHECKS[1:], not_run)

    def _time_planning(self) -> None:
        """Record what a plan takes without the decompositions, in seconds."""
        started = time.perf_counter()
        try:
            traced = Trace()(Program(module=self.model)).program
            ObserveInputs(self.example.eval.example())(Find()(traced).program)
        except Exception as error:  # the checks that follow fail with the same error
            self.verdict.facts["planning_error"] = describe_error(error)
        self.verdict.facts["planning_s"] = round(time.perf_counter() - started, 3)

    def _check_full_rank(self) -> None:
        rewritten = self._rewrite(FULL, CHECKS[:4])
        shared = {id(parameter) for parameter in (self.model if rewritten is None else rewritten).parameters()}
        parameters = self.model.named_parameters()
        self.wanted = {name: weight for name, weight in parameters if id(weight) in shared and weight.requires_grad}
        self.reference = self._observe_both(self.model)
        self.response = rounding_response(self.model, self.reference, self.account.names, self._observe_both)
        if rewritten is None:
            return
        inputs = self.example.eval.example()
        plan = getattr(rewritten, PLAN_ATTRIBUTE, None) or tdfx.plan(self.model, FULL, example_inputs=inputs)
        self.verdict.facts |= {
            "sites": len(plan),
            "factorized": len(plan.factorized),
            "kept": dict(Counter(str(site.reason) for site in plan.kept)),
            "emit": plan.emit,
            "notes": list(plan.notes),
        }
        self._check("accounted", lambda: zoo_verdict.accounted(self.account, plan))
        for mode in ("train", "eval"):
            self._check(f"full_{mode}", lambda mode=mode: self._same(rewritten, mode))  # type: ignore[misc]
        self._check("gradients", lambda: self._same_gradients(rewritten))

    def _same(self, rewritten: nn.Module, mode: str) -> ZooCheck:
        return zoo_verdict.same_runs(
            self.reference[mode], self._observe(rewritten, mode == "train"), self.response[mode]
        )

    def _same_gradients(self, rewritten: nn.Module) -> ZooCheck:
        if not self.with_gradients:
            return ZooCheck(None, {}, "not run: the estimate with gradients is above --memory")
        observation = self._observe(rewritten, True, self.wanted)
        return zoo_verdict.same_gradients(self.reference["train"], observation, self.response["train"])

    def _check_low_rank(self) -> None:
        rewritten = self._rewrite(LOW, CHECKS[4:6])
        if rewritten is not None:
            self._check("control", lambda: self._control(rewritten))
            self._check("merge", lambda: self._merge(rewritten))

    def _control(self, rewritten: nn.Module) -> ZooCheck:
        if not any(isinstance(module, tdfx.Factorized) for module in rewritten.modules()):
            return ZooCheck(None, {}, "no site is factorized, so nothing can change")
        outputs = self._observe(rewritten, True).outputs
        gap = gap_of(self.reference["train"].outputs, outputs, self.response["train"])
        ok = gap.share >= CONTROL
        return ZooCheck(ok, zoo_verdict.figures_of(gap), "" if ok else "a low rank changes nothing")

    def _merge(self, rewritten: nn.Module) -> ZooCheck:
        with preserved(rewritten, False):
            warm_up(rewritten, self.example.train)
            merged = tdfx.merge(rewritten)
            fresh = build_model(self.verdict.model).to(self.dtype)
            if difference := zoo_verdict.architecture_difference(self.model, merged, fresh):
                return ZooCheck(False, {}, difference)
            del fresh

            def run(model: nn.Module) -> dict[str, Observation]:
                return {"eval": self._observe(model, False)}

            reference = run(merged)
            response = rounding_response(merged, reference, self.account.names, run)
            return zoo_verdict.same_runs(reference["eval"], self._observe(rewritten, False), response["eval"])

    def _observe_both(self, model: nn.Module) -> dict[str, Observation]:
        parameters = dict(model.named_parameters())
        wanted = {name: parameters[name] for name in self.wanted} if self.with_gradients else None
        return {"train": self._observe(model, True, wanted), "eval": self._observe(model, False)}

    def _observe(self, model: nn.Module, mode: bool, wanted: Mapping[str, nn.Parameter] | None = None) -> Observation:
        call = self.example.train if mode else self.example.eval
        return observe(model, call, mode=mode, wanted=wanted, watched=self.example.watched)


def affordable_precision(model: nn.Module, account: Account, memory: float) -> tuple[torch.dtype | None, bool, float]:
    """Return the dtype to examine a model in, whether with gradients, and the GiB that this takes by estimate.

    In memory are the original; at full rank, its factors; then either the eigenvectors, always in float64, or a copy with
    changed weights; and what the forward computes, of which a backward holds up to all, and as much again in gradients.
    """
    multiplied = set(account.names)
    weights = [weight for name, weight in model.named_parameters() if name in multiplied and weight.dim() > 1]
    values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    counts = [_full_rank_counts(weight) for weight in weights]
    factors, vectors = (sum(count[index] for count in counts) for index in (0, 1))
    choices: list[tuple[torch.dtype, bool]] = [(torch.float64, True), (torch.float32, True), (torch.float32, False)]
    needed = math.inf
    for dtype, gradients in choices:
        size = torch.finfo(dtype).bits // 8
        computed = account.bytes * size // 4 * (2 if gradients else 0.25)
        needed = (size * (values + factors) + max(8 * vectors, size * values) + computed) / GIBIBYTE
        if needed <= memory:
            return dtype, gradients, needed
    return None, False, needed


def _full_rank_counts(weight: Tensor) -> tuple[int, int]:
    """Return how many values the full-rank factors of a weight have, and how many its eigenvectors."""
    rows, cols = weight.shape[:2]
    if weight[0, 0].numel() == 1:
        short = min(rows, cols)
        return short * (rows + cols), short * short
    return weight.numel() + rows * rows + cols * cols, rows * rows + cols * cols

"""The results of a run, as they are written to files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import tdfx
from recipe.phases import training_seconds
from recipe.trainer import TrainingRun


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run and its results."""

    config: dict[str, Any]
    """Its settings, seed included."""
    processes: int
    device: str
    epochs: list[dict[str, float]]
    """For each epoch: training loss, the seconds of training up to its end, and where it was scored held-out loss and
    accuracy in percent."""
    accuracy: float
    loss: float
    """Both of the merged model, in percent and in nats."""
    seconds: dict[str, float]
    """By phase."""
    parameters: int
    parameters_after: int
    """From the switch to the merge."""
    steps: int = 0
    """Steps of the whole training."""
    flops: int | None = None
    """Forward operations of the sites for one batch, before a switch; None if there was no switch."""
    flops_after: int | None = None
    sites: int = 0
    factorized: list[dict[str, Any]] = field(default_factory=list)
    """For each factorized site: name, scheme, ranks, error."""
    events: list[str] = field(default_factory=list)
    """The decisions of the switch."""
    merge_error: float | None = None
    """Largest difference of outputs before and after the merge, relative to the largest output."""
    verified: bool | None = None
    """Whether the merged graph is the original's, by ONNX; None if that was not checked."""

    @property
    def total(self) -> float:
        """Seconds of training: all phases but evaluation and saving."""
        return training_seconds(self.seconds)


def record_of(run: TrainingRun) -> RunRecord:
    """Return the results of a run that has ended; all its processes must call this."""
    score = run.final_score()
    plan = None if run.switch is None else run.switch.plan
    verify = run.config.output.verify and plan is not None and run.process.is_first
    return RunRecord(
        config=run.config.model_dump(mode="json"),
        processes=run.process.world,
        device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        epochs=run.history,
        accuracy=score.accuracy,
        loss=score.loss,
        seconds=dict(run.phases.seconds),
        parameters=run.parameters,
        parameters_after=run.parameters if plan is None else plan.parameters_after,
        steps=run.total_steps,
        flops=None if plan is None else plan.flops_before,
        flops_after=None if plan is None else plan.flops_after,
        sites=0 if plan is None else len(plan),
        factorized=[] if plan is None else [_site_dict(site) for site in plan.factorized],
        events=[] if run.switch is None else [str(event) for event in run.switch.events],
        merge_error=run.merge_error,
        verified=run.verify() if verify else None,
    )


def _site_dict(site: tdfx.SitePlan) -> dict[str, Any]:
    return {"name": site.name, "scheme": site.scheme, "ranks": list(site.ranks or ()), "error": site.error}

"""What is written down of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import tdfx
from recipe.phases import TRAINING
from recipe.trainer import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run and what it came to."""

    config: dict[str, Any]
    """Its settings, seed included."""
    processes: int
    device: str
    epochs: list[dict[str, float]]
    """Of each epoch: training loss, held-out loss and accuracy in percent, and the seconds of training up to its end."""
    accuracy: float
    """Of the merged model, in percent."""
    loss: float
    """Of the merged model, in nats."""
    seconds: dict[str, float]
    """By phase."""
    parameters: int
    """Before a switch."""
    parameters_after: int
    """From the switch to the merge."""
    flops: int | None = None
    """Forward operations of the sites for one batch, before a switch; None where there was none."""
    flops_after: int | None = None
    sites: int = 0
    factorized: list[dict[str, Any]] = field(default_factory=list)
    """Of each site that was rewritten: name, scheme, ranks, error."""
    events: list[str] = field(default_factory=list)
    """What the switch decided."""
    merge_error: float | None = None
    """Largest difference of outputs to the model before the merge, relative to the largest output."""
    verified: bool | None = None
    """Whether the merged graph is the original's, by ONNX; None where that was not asked."""

    @property
    def total(self) -> float:
        """Seconds of training: all phases but evaluation and saving."""
        return sum(self.seconds[name] for name in TRAINING)


def record_of(run: Run, *, checks: bool = True) -> Record:
    """Return what a run that has ended came to; all its processes must call it."""
    found = run.final_score()
    plan = None if run.switch is None else run.switch.plan
    verified = run.prove() if checks and run.config.output.verify and plan is not None and run.place.first else None
    return Record(
        config=json.loads(json.dumps(asdict(run.config))),  # as it is read back: lists for tuples
        processes=run.place.world,
        device=_device_name(run.device),
        epochs=run.history,
        accuracy=found.accuracy,
        loss=found.loss,
        seconds=dict(run.phases.seconds),
        parameters=run.parameters,
        parameters_after=run.parameters if plan is None else plan.parameters_after,
        flops=None if plan is None else plan.flops_before,
        flops_after=None if plan is None else plan.flops_after,
        sites=0 if plan is None else len(plan),
        factorized=[] if plan is None else [_site(one) for one in plan.factorized],
        events=[] if run.switch is None else [str(one) for one in run.switch.events],
        merge_error=run.merge_error,
        verified=verified,
    )


def _site(one: tdfx.SitePlan) -> dict[str, Any]:
    return {"name": one.name, "scheme": one.scheme, "ranks": list(one.ranks or ()), "error": one.error}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

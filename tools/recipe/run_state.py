"""What a training run holds: model, optimizer, switch, data, progress and times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from bench_common import Clock
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import tdfx
from recipe.config import RunConfig
from recipe.data import DataSet
from recipe.datasets import load_data
from recipe.models import build
from recipe.phases import Phases
from recipe.processes import Process
from recipe.schedule import make_average, make_optimizer, total_steps
from recipe.score import to_device

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class RunProgress:
    """How far a run has come."""

    epoch: int = 0
    step: int = 0
    """Completed epochs, and completed steps of the current one."""
    loss: float = 0.0
    """Sum of the losses of these steps, in nats."""


class RunState:
    """The state of a run in one of its processes."""

    def __init__(
        self, config: RunConfig, process: Process, device: torch.device, clock: Clock = time.perf_counter
    ) -> None:
        """Create everything from the settings and their seed; RecipeError if data and model do not go together."""
        self.config, self.process, self.device = config, process, device
        self.layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
        self.data: DataSet = load_data(config, process)
        self.phases = Phases(clock, device)
        torch.manual_seed(config.seed)
        self.model = self.new_model()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.average: AveragedModel | None = make_average(self.model, config.training.ema)
        self.optimizer = make_optimizer(self.model.parameters(), config.training)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.training.amp == "fp16")
        self.total_steps = total_steps(self.data.steps, config.training)
        self.switch = make_switch(config, self.data.steps, clock)
        if config.training.compile:
            self.model.compile()
        if process.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=ids)
        self.progress = RunProgress()
        self.history: list[dict[str, float]] = []
        # Random numbers during training, as of dropout, differ between processes.
        torch.manual_seed(config.seed + 1_000_003 * (process.rank + 1))

    def new_model(self) -> nn.Module:
        """Return an untrained network on the device of the run."""
        model = build(self.config.model, self.data.shape).to(self.device)
        has_kernels = any(parameter.dim() == 4 for parameter in model.parameters())
        return model.to(memory_format=self.layout) if has_kernels else model

    @cached_property
    def example(self) -> tuple[Tensor]:
        """The inputs of the first batch, as example inputs."""
        return (to_device(next(self.data.batches(0))[0], self.device, self.layout),)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without its wrapper for several processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def make_switch(config: RunConfig, steps: int, clock: Clock = time.perf_counter) -> tdfx.Switch | None:
    """Return the switch of a run with so many steps in an epoch; None for a run without a rewrite."""
    settings = config.switch
    if settings.policy == "none":
        return None
    options: dict[str, Any] = {"rewarm": settings.rewarm, "clock": clock}
    if settings.when == "epoch":
        options["when"] = tdfx.AtEpoch(settings.epoch, steps_per_epoch=steps)
    elif settings.when == "settled":
        options["when"] = tdfx.Settled(every=settings.every, timeout=settings.epoch * steps or None)
    if settings.weigh:
        options["total_steps"] = total_steps(steps, config.training)
    # Layers are timed under the autocast of the training steps.
    measured = tdfx.Measured(autocast=DTYPES.get(config.training.amp), budget=settings.measure)
    policy = settings.policy_with(tdfx.Modelled() if settings.cost == "modelled" else measured)
    return tdfx.Switch(policy, **options)

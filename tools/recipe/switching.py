"""The switch of a run, from its settings."""

from __future__ import annotations

import time

import torch
from bench_common import Clock

import tdfx
from recipe.config import RunConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_switch(config: RunConfig, steps: int, clock: Clock = time.perf_counter) -> tdfx.Switch | None:
    """Return the switch of a run with so many steps in an epoch; None for a run without a rewrite."""
    settings = config.switch
    if settings.policy == "none":
        return None
    when: tdfx.AtEpoch | tdfx.Settled = tdfx.Settled(every=settings.every, timeout=settings.epoch * steps or None)
    if settings.when == "epoch":
        when = tdfx.AtEpoch(settings.epoch, steps_per_epoch=steps)
    total = config.training.epochs * steps if settings.weigh else None
    # Layers are timed under the autocast of the training steps.
    measured = tdfx.Measured(autocast=DTYPES.get(config.training.amp), budget=settings.measure)
    policy = settings.policy_with(tdfx.Modelled() if settings.cost == "modelled" else measured)
    return tdfx.Switch(policy, when=when, total_steps=total, rewarm=settings.rewarm, clock=clock)

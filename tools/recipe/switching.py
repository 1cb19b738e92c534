"""The switch of a run, from its settings."""

from __future__ import annotations

import time
from typing import Any

import torch
from bench_common import Clock

import tdfx
from recipe.config import RunConfig
from recipe.settings import SwitchingSettings
from tdfx.ranks.registry import parse_rule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def policy_of(settings: SwitchingSettings, amp: str = "none") -> tdfx.Policy:
    """Return the policy of the settings; layers are timed under the autocast of the training steps."""
    measured = tdfx.Measured(autocast=DTYPES.get(amp), budget=settings.measure)
    cost = tdfx.Modelled() if settings.cost == "modelled" else measured
    given: dict[str, Any] = {} if settings.policy == "default" else {"rank": parse_rule(settings.policy)}
    return tdfx.Policy(
        **given, min_gain=settings.min_gain, round_to=settings.round_to, exclude=settings.exclude, cost=cost
    )


def make_switch(config: RunConfig, steps: int, clock: Clock = time.perf_counter) -> tdfx.Switch | None:
    """Return the switch of a run with so many steps in an epoch; None for a run without a rewrite."""
    settings = config.switch
    if settings.policy == "none":
        return None
    when: tdfx.AtEpoch | tdfx.Settled = tdfx.Settled(every=settings.every, timeout=settings.epoch * steps or None)
    if settings.when == "epoch":
        when = tdfx.AtEpoch(settings.epoch, steps_per_epoch=steps)
    total = config.training.epochs * steps if settings.weigh else None
    policy = policy_of(settings, config.training.amp)
    return tdfx.Switch(policy, when=when, total_steps=total, rewarm=settings.rewarm, clock=clock)

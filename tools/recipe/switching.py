"""What decides when a run is rewritten, made from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import tdfx
from recipe.config import Config
from recipe.settings import Switching
from tdfx.ranks.registry import parse_rule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def policy_of(wish: Switching, amp: str = "none") -> tdfx.Policy:
    """Return the policy that settings name; what is timed is timed under the autocast that the steps have."""
    rank = None if wish.policy == "default" else parse_rule(wish.policy)
    measured = tdfx.Measured(autocast=DTYPES.get(amp), budget=wish.measure)
    cost = tdfx.Modelled() if wish.cost == "modelled" else measured
    settings = {"min_gain": wish.min_gain, "round_to": wish.round_to, "exclude": wish.exclude, "cost": cost}
    return tdfx.Policy(**settings) if rank is None else tdfx.Policy(rank=rank, **settings)  # type: ignore[arg-type]


def make_switch(config: Config, steps: int, clock: Callable[[], float] = time.perf_counter) -> tdfx.Switch | None:
    """Return what switches a run of so many steps an epoch; None for a run as it is."""
    wish = config.switch
    if wish.policy == "none":
        return None
    when: tdfx.AtEpoch | tdfx.Settled = tdfx.Settled(every=wish.every, timeout=wish.epoch * steps or None)
    if wish.when == "epoch":
        when = tdfx.AtEpoch(wish.epoch, steps_per_epoch=steps)
    total = config.training.epochs * steps if wish.weigh else None
    policy = policy_of(wish, config.training.amp)
    return tdfx.Switch(policy, when=when, total_steps=total, rewarm=wish.rewarm, clock=clock)

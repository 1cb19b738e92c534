"""The rows of the paper's table: each network and data set under several policies, with several seeds, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from bench_common import Clock, separate_times

import tdfx
from recipe.config import RunConfig, with_values
from recipe.processes import Process
from recipe.record import RunRecord, record_of
from recipe.trainer import TrainingRun

FULL = "full"
POLICIES: dict[str, dict[str, Any]] = {
    FULL: {"switch.policy": "none"},
    "tdfx default": {"switch.policy": "default"},
    "speedup=2": {"switch.policy": "speedup:2"},
    "VBMF as published": {"switch.policy": "vbmf:0", "switch.min_gain": 0.0, "switch.round_to": 1},
    "energy 0.9": {"switch.policy": "energy:0.9"},
}
"""Name -> settings of a row. "As published" means every layer, at exactly the ranks that VBMF finds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """One run of the table."""

    run: str
    """Name of the config file, without its ending."""
    policy: str
    seed: int
    cold: bool
    """True if no layer times were known beforehand, so that they had to be measured."""
    record: RunRecord | None = None
    refused: str = ""
    """Why tdfx refused the policy; "" if it did not."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the row."""
        return self.run, self.policy, self.seed


def rows(
    configs: Mapping[str, RunConfig],
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    clock: Clock,
    device: torch.device,
    echo: Callable[[str], None],
    done: Sequence[PaperRow] = (),
) -> Iterator[PaperRow]:
    """Yield the rows that are not done yet, the policies in turns, so that disturbances of the machine affect all alike."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    done_keys = {row.key for row in done}
    for seed, (name, config), policy in product(seeds, configs.items(), policies):
        if (name, policy, seed) not in done_keys:
            settings = with_values(config, {"seed": seed, **POLICIES[policy]})
            echo(f"{name}, {policy}, seed {seed}")
            run = TrainingRun(settings, Process(), device, clock)
            yield _row(name, policy, run, times.setdefault((name, policy), {}), echo)


def _row(name: str, policy: str, run: TrainingRun, times: dict[str, float], echo: Callable[[str], None]) -> PaperRow:
    row = PaperRow(run=name, policy=policy, seed=run.config.seed, cold=not times)
    with separate_times(times):
        try:
            run.train(echo)
        except tdfx.PolicyError as error:
            return replace(row, refused=str(error))
    return replace(row, record=record_of(run))

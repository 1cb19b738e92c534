"""The rows of the paper's table: each network and data set in full, under several policies, and dense in the same time."""

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

FULL, DEFAULT, CONTROL = "full", "tdfx default", "dense, same time"
POLICIES: dict[str, dict[str, Any]] = {
    FULL: {"switch.policy": "none"},
    DEFAULT: {"switch.policy": "default"},
    CONTROL: {"switch.policy": "none"},
    "weights": {"switch.policy": "default", "switch.metric": "weights"},
    "speedup=2": {"switch.policy": "speedup:2"},
    "VBMF as published": {"switch.policy": "vbmf:0", "switch.min_gain": 0.0, "switch.round_to": 1},
    "energy 0.9": {"switch.policy": "energy:0.9"},
}
"""Name -> settings of a row, in the order of a seed. The control is the full run, shortened with its schedule to the time
that the default of its seed took. "As published" means every layer, at exactly the ranks that VBMF finds."""
USUAL = (FULL, DEFAULT, CONTROL)
"""The rows that are run unless others are asked for."""
Key = tuple[str, str, int]
"""Name of the config, policy and seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """One run of the table."""

    run: str
    """Name of the config file, without its ending."""
    policy: str
    seed: int
    cold: bool
    """True if the run had to measure layers, because no layer times were known."""
    record: RunRecord | None = None
    refused: str = ""
    """Why tdfx refused the policy; "" if it did not."""

    @property
    def key(self) -> Key:
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
    done: Mapping[Key, PaperRow],
) -> Iterator[PaperRow]:
    """Yield the rows that are not done yet, the policies in turns, so that disturbances of the machine affect all alike."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    known = dict(done)
    ordered = [policy for policy in POLICIES if policy in policies]
    for seed, (name, config), policy in product(seeds, configs.items(), ordered):
        settings = settings_of((name, policy, seed), config, known)
        if settings is None:
            echo(
                f"{name}, {policy}, seed {seed}: left out, for it needs the rows {FULL!r} and {DEFAULT!r} of this seed"
            )
        elif not _was_run_with(settings, known.get((name, policy, seed))):
            echo(f"{name}, {policy}, seed {seed}")
            run = TrainingRun(settings, Process(), device, clock)
            row = _row(name, policy, run, times.setdefault((name, policy), {}), echo)
            known[row.key] = row
            yield row


def current_rows(found: Sequence[PaperRow], configs: Mapping[str, RunConfig]) -> dict[Key, PaperRow]:
    """Return the rows of the configs that were run with the settings that they would be run with now, by key."""
    rows_by_key = {row.key: row for row in found if row.run in configs and row.policy in POLICIES}
    return {
        key: row
        for key, row in rows_by_key.items()
        if _was_run_with(settings_of(key, configs[row.run], rows_by_key), row)
    }


def settings_of(key: Key, config: RunConfig, known: Mapping[Key, PaperRow]) -> RunConfig | None:
    """Return the settings of a row; None for a control without the rows that say how long it shall be."""
    name, policy, seed = key
    changes = {"seed": seed, **POLICIES[policy]}
    if policy == CONTROL:
        full, default = (known[other].record if (other := (name, each, seed)) in known else None for each in USUAL[:2])
        if full is None or default is None:
            return None
        steps = max(1, int(full.steps * default.total / full.total))
        changes |= {"training.steps": steps, "training.warmup": config.training.warmup * steps / max(1, full.steps)}
    return with_values(config, changes)


def _was_run_with(settings: RunConfig | None, row: PaperRow | None) -> bool:
    """Return True if a row was run with these settings, outputs and the name aside; a refused row has none."""
    if settings is None or row is None or row.record is None:
        return False
    wanted, had = (
        {key: value for key, value in config.items() if key not in {"name", "output"}}
        for config in (settings.model_dump(mode="json"), row.record.config)
    )
    return wanted == had


def _row(name: str, policy: str, run: TrainingRun, times: dict[str, float], echo: Callable[[str], None]) -> PaperRow:
    none_known = not times
    row = PaperRow(run=name, policy=policy, seed=run.config.seed, cold=False)
    with separate_times(times):
        try:
            run.train(echo)
        except tdfx.PolicyError as error:
            return replace(row, refused=str(error))
    return replace(row, record=record_of(run), cold=none_known and bool(times))

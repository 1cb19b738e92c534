"""The rows of the paper's table: one network and data set under several policies, from several seeds, in turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from bench_common import own_times

import tdfx
from recipe.config import Config, with_values
from recipe.data import Place
from recipe.record import Record, record_of
from recipe.trainer import Clock, Run, Say

FULL = "full"
POLICIES: dict[str, dict[str, Any]] = {
    FULL: {"switch.policy": "none"},
    "tdfx default": {"switch.policy": "default"},
    "speedup=2": {"switch.policy": "speedup:2"},
    "VBMF as published": {"switch.policy": "vbmf:0", "switch.min_gain": 0.0, "switch.round_to": 1},
    "energy 0.9": {"switch.policy": "energy:0.9"},
}
"""Name -> settings of a row. As published means: every layer, at the ranks that VBMF says, whatever they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run of the table."""

    run: str
    """Name of the config file, without its ending."""
    policy: str
    seed: int
    cold: bool
    """True if no times of layers were known beforehand, so that they had to be measured."""
    record: Record | None = None
    refused: str = ""
    """Why the policy could not be followed."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What no other row has."""
        return self.run, self.policy, self.seed


def row_of(values: Mapping[str, Any]) -> Row:
    """Return a row from what ``asdict`` gave."""
    record = values["record"]
    return Row(**{**values, "record": None if record is None else Record(**record)})


def rows(
    configs: Mapping[str, Config],
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    clock: Clock,
    device: torch.device,
    say: Say,
    done: Sequence[Row] = (),
) -> Iterator[Row]:
    """Yield the rows that are not done yet: all policies in turns, so that what disturbs the machine disturbs all alike."""
    known: dict[tuple[str, str], dict[str, float]] = {}
    made = {one.key for one in done}
    for seed, (name, config), policy in product(seeds, configs.items(), policies):
        if (name, policy, seed) not in made:
            times = known.setdefault((name, policy), {})
            wish = with_values(config, {"seed": seed, **POLICIES[policy]})
            say(f"{name}, {policy}, seed {seed}")
            yield _row(name, policy, Run(wish, Place(), device, clock), times, say)


def _row(name: str, policy: str, run: Run, times: dict[str, float], say: Say) -> Row:
    own = {"run": name, "policy": policy, "seed": run.config.seed, "cold": not times}
    with own_times(times):
        try:
            run.train(say)
        except tdfx.PolicyError as error:
            return Row(**own, refused=str(error))  # type: ignore[arg-type]
    return Row(**own, record=record_of(run))  # type: ignore[arg-type]


def as_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as JSON can hold them."""
    return [asdict(one) for one in found]

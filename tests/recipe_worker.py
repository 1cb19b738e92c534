"""A training run on two processes, started by torchrun from test_recipe_processes.py: whole, and stopped and resumed."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recipe_runs import config_of, tool

CHECKS = ("it goes on to the same bits", "it learns from both halves", "it is the same model on both")


def bits(run: Any) -> torch.Tensor:
    return torch.cat([one.detach().double().flatten() for one in run.merged.parameters()])


def check(folder: Path, place: Any, device: torch.device) -> None:
    """Make all checks; what fails says which."""
    settings = {"output__checkpoint": str(folder / "run.tdfx"), "output__every": 2, "training__ema": 0.5}
    config, runs = config_of(**settings), []
    for stop in (None, 5):
        run = tool("recipe.trainer").Run(config, place, device)
        assert run.train(most_steps=stop) == (stop is None)
        runs.append(run)
    again = tool("recipe.trainer").Run(config, place, device)
    tool("recipe.checkpoint").resume(again, folder / "run.tdfx")
    assert (again.progress.epoch, again.progress.step) == (1, 2)
    again.train()
    whole = runs[0]
    assert whole.switch.plan.factorized, CHECKS[0]
    assert torch.equal(bits(again), bits(whole)), CHECKS[0]
    assert again.final_score() == whole.final_score(), CHECKS[0]
    both = [torch.empty_like(bits(whole)) for _ in range(2)]
    dist.all_gather(both, bits(whole))
    assert torch.equal(*both), CHECKS[2]
    # The other half of each batch must have had its say.
    alone = tool("recipe.trainer").Run(config, place, device)
    alone.model = alone.model.module
    alone.config = config_of(training__ema=0.5)
    alone.train(most_steps=1)
    shared = tool("recipe.trainer").Run(config, place, device)
    shared.train(most_steps=1)
    weights = [torch.cat([one.detach().flatten() for one in run.model.parameters()]) for run in (alone, shared)]
    assert not torch.equal(*weights), CHECKS[1]
    record = tool("recipe.record").record_of(whole)
    assert record.processes == 2, CHECKS[0]


def main() -> None:
    """Write what went wrong in either process, "" for nothing."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch.*")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with tool("train").processes() as (place, device):
        try:
            check(folder, place, device)
            mine = ""
        except Exception:  # it is told to pytest
            mine = traceback.format_exc()
        both: list[Any] = [None, None]
        dist.all_gather_object(both, mine)
        if place.first:
            (folder / "outcomes.json").write_text(json.dumps({"run": "\n".join(filter(None, both))}), encoding="utf-8")


if __name__ == "__main__":
    main()

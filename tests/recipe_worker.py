"""A training run on two processes, started by torchrun from test_recipe_processes.py: uninterrupted, and resumed."""

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

CHECKS = ("it resumes to the same bits", "it learns from both halves", "it is the same model on both")


def bits(run: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in run.merged.parameters()])


def check(folder: Path, process: Any, device: torch.device) -> None:
    """Run all checks; an assertion names the one that fails."""
    settings = {"output__checkpoint": str(folder / "run.tdfx"), "output__every": 2, "training__ema": 0.5}
    config, runs = config_of(**settings), []
    new_run = tool("recipe.trainer").TrainingRun
    for stop in (None, 5):
        run = new_run(config, process, device)
        assert run.train(most_steps=stop) == (stop is None)
        runs.append(run)
    resumed = new_run(config, process, device)
    tool("recipe.checkpoint").resume(resumed, folder / "run.tdfx")
    assert (resumed.progress.epoch, resumed.progress.step) == (1, 2)
    resumed.train()
    uninterrupted = runs[0]
    assert uninterrupted.switch.plan.factorized, CHECKS[0]
    assert torch.equal(bits(resumed), bits(uninterrupted)), CHECKS[0]
    assert resumed.final_score() == uninterrupted.final_score(), CHECKS[0]
    both = [torch.empty_like(bits(uninterrupted)) for _ in range(2)]
    dist.all_gather(both, bits(uninterrupted))
    assert torch.equal(*both), CHECKS[2]
    # The other half of each batch must have an influence.
    alone = new_run(config, process, device)
    alone.model = alone.model.module
    alone.config = config_of(training__ema=0.5)
    alone.train(most_steps=1)
    shared = new_run(config, process, device)
    shared.train(most_steps=1)
    weights = [
        torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]) for run in (alone, shared)
    ]
    assert not torch.equal(*weights), CHECKS[1]
    record = tool("recipe.record").record_of(uninterrupted)
    assert record.processes == 2, CHECKS[0]


def main() -> None:
    """Write the errors of both processes, "" for none."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch.*")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with tool("recipe.processes").join_processes() as (process, device):
        try:
            check(folder, process, device)
            error = ""
        except Exception:  # the test reports it
            error = traceback.format_exc()
        errors: list[Any] = [None, None]
        dist.all_gather_object(errors, error)
        if process.is_first:
            text = json.dumps({"run": "\n".join(filter(None, errors))})
            (folder / "outcomes.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

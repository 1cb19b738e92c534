"""Saving a run after any step, and going on from there to the same bits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tdfx
from recipe.errors import RecipeError

if TYPE_CHECKING:
    from recipe.trainer import Run


def save(run: Run, path: Path) -> None:
    """Write all that the rest of a run depends on, whole or not at all; all processes must call it.

    What is drawn at random for data depends on seed, epoch and step alone, so that only torch's own stream is kept.
    """
    mine = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(run.device)
    streams: list[Any] = [mine]
    if run.place.world > 1:
        streams = [None] * run.place.world
        dist.all_gather_object(streams, mine)
    if run.place.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        tdfx.save(_inner(run.model), path, optimizer=run.optimizer, extra=_extra(run, streams))
    if run.place.world > 1:
        dist.barrier()


def _extra(run: Run, streams: list[Any]) -> dict[str, Any]:
    average = run.average
    return {
        "config": settings_of(run),
        "progress": asdict(run.progress),
        "history": run.history,
        "phases": run.phases.seconds,
        "streams": streams,
        "scaler": run.scaler.state_dict(),
        "switch": None if run.switch is None else run.switch.state_dict(),
        "average": None if average is None else tdfx.state(average.module),
        "averaged": 0 if average is None else int(average.n_averaged),
    }


def resume(run: Run, path: Path) -> None:
    """Bring a run that was just made to where a saved one was; all processes must call it.

    Raises:
        RecipeError: There is no such file, or it is of a run with other settings.
        CheckpointError: The file is damaged.
    """
    if not path.is_file():
        raise RecipeError(
            f"--resume found no checkpoint {str(path)!r}. Set output.checkpoint to the file that was written, or leave "
            f"--resume out to begin anew."
        )
    saved = tdfx.read(path)
    extra = saved["extra"]
    own = settings_of(run)
    if extra["config"] != own:
        odd = [key for key in own.keys() | extra["config"].keys() if own.get(key) != extra["config"].get(key)]
        raise RecipeError(
            f"The checkpoint {str(path)!r} is of a run with another {sorted(odd)[0]}: {extra['config'].get(sorted(odd)[0])} "
            f"there and {own.get(sorted(odd)[0])} here. Resume with the settings of that run."
        )
    if len(extra["streams"]) != run.place.world:
        raise RecipeError(
            f"The checkpoint {str(path)!r} is of a run on {len(extra['streams'])} processes, and {run.place.world} go on: "
            f"each would see other data. Start as many."
        )
    run.model = tdfx.load(saved, run.model, optimizer=run.optimizer)
    if run.average is not None:
        run.average.module = tdfx.load(extra["average"], run.average.module)
        run.average.n_averaged.fill_(extra["averaged"])
    if run.switch is not None:
        run.switch.load_state_dict(extra["switch"], optimizer=run.optimizer)
    run.scaler.load_state_dict(extra["scaler"])
    for key, value in extra["progress"].items():
        setattr(run.progress, key, value)
    run.history[:] = extra["history"]
    run.phases.seconds.update(extra["phases"])
    mine = extra["streams"][run.place.rank]
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and run.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], run.device)


def settings_of(run: Run) -> dict[str, Any]:
    """Return what must be the same in a run that goes on: everything but what it leaves behind, and its name."""
    values = asdict(run.config)
    return {key: repr(one) for key, one in values.items() if key not in {"output", "name"}}


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model

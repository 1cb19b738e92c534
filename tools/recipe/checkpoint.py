"""Saving a run after any step, and resuming it with bit-identical results."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tdfx
from recipe.errors import RecipeError
from recipe.run_state import RunState, unwrapped


def save(run: RunState, path: Path) -> None:
    """Write everything that the rest of a run depends on, in one move; all processes must call this.

    The random numbers of the data depend on seed, epoch and step alone, so only torch's global stream is saved.
    """
    stream = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        stream["cuda"] = torch.cuda.get_rng_state(run.device)
    streams: list[Any] = [stream]
    if run.process.world > 1:
        streams = [None] * run.process.world
        dist.all_gather_object(streams, stream)
    if run.process.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        tdfx.save(unwrapped(run.model), path, optimizer=run.optimizer, extra=_extra(run, streams))
    if run.process.world > 1:
        dist.barrier()


def _extra(run: RunState, streams: list[Any]) -> dict[str, Any]:
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


def resume(run: RunState, path: Path) -> None:
    """Load a saved run into a new one; all processes must call this.

    RecipeError says that there is no such file, or that its run had other settings, and CheckpointError that it is damaged.
    """
    if not path.is_file():
        raise RecipeError(
            f"--resume found no checkpoint {str(path)!r}. Set output.checkpoint to the file that was written, or leave "
            f"--resume out to start from the beginning."
        )
    saved = tdfx.read(path)
    extra = saved["extra"]
    _check_settings(extra["config"], settings_of(run), path)
    if len(extra["streams"]) != run.process.world:
        raise RecipeError(
            f"The checkpoint {str(path)!r} is of a run on {len(extra['streams'])} processes, and {run.process.world} were "
            f"started: each would see other data. Start as many."
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
    stream = extra["streams"][run.process.rank]
    torch.set_rng_state(stream["cpu"])
    if "cuda" in stream and run.device.type == "cuda":
        torch.cuda.set_rng_state(stream["cuda"], run.device)


def settings_of(run: RunState) -> dict[str, str]:
    """Return the settings that must be the same in a resumed run: all but the outputs and the name."""
    return {key: repr(value) for key, value in run.config.model_dump(exclude={"output", "name"}).items()}


def _check_settings(saved: dict[str, str], given: dict[str, str], path: Path) -> None:
    for key in sorted(key for key in saved.keys() | given.keys() if saved.get(key) != given.get(key)):
        raise RecipeError(
            f"The checkpoint {str(path)!r} is of a run with another {key}: {saved.get(key)} there and {given.get(key)} here."
            f" Resume with the settings of that run."
        )

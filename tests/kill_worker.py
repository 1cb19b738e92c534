"""Training runs that may be killed at any moment. One process forks a child for each run, so that torch is imported once.

It reads lines of JSON from standard input and answers each with the exit status of the child.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # noqa: F401  # optimizers import it, which would take two seconds in every child
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import tdfx
import tdfx.checkpoint.atomic
import tdfx.optim.companions
import tdfx.passes.transform.rewrite
import tdfx.public  # noqa: F401  # all that a run needs, so that no child has to import it

STEPS, SWITCH, LOWER = 14, 4, 9


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def optimizer_of(name: str, model: nn.Module) -> Optimizer:
    if name == "sgd":
        return SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    return AdamW(model.parameters(), lr=0.01)


def train(folder: Path, name: str, *, forget: bool = False) -> None:
    """Train to the end, from the last checkpoint if there is one."""
    path = folder / "run.tdfx"
    model: nn.Module = build()
    optimizer = optimizer_of(name, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.8)
    order = torch.Generator().manual_seed(1)
    data = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(32) % 4
    first = 0
    torch.manual_seed(3)
    if path.exists():
        saved = tdfx.read(path)
        model = tdfx.load(saved, model, optimizer=optimizer)
        scheduler.load_state_dict(saved["extra"]["scheduler"])
        order.set_state(saved["extra"]["order"])
        torch.set_rng_state(saved["extra"]["rng"])
        first = saved["extra"]["step"]
        if forget:
            optimizer.state.clear()
    for step in range(first, STEPS):
        if step in {SWITCH, LOWER}:
            policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5 if step == SWITCH else 0.25), min_gain=0)
            model = tdfx.rewrite(model, policy, optimizer=optimizer)
        batch = torch.randperm(32, generator=order)[:8]
        loss = nn.functional.cross_entropy(model(data[batch]), labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        extra = {
            "step": step + 1,
            "scheduler": scheduler.state_dict(),
            "order": order.get_state(),
            "rng": torch.get_rng_state(),
        }
        tdfx.save(model, path, optimizer=optimizer, extra=extra)


def die_at(place: str, count: int) -> None:
    """Kill this process when a named place is reached for the ``count``-th time."""
    owner, attribute = PLACES[place]
    original: Callable[..., Any] = getattr(owner, attribute)
    left = [count]

    def fatal(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, fatal)


PLACES: dict[str, tuple[Any, str]] = {
    "before the file": (torch, "save"),
    "inside the file": (zlib, "crc32"),
    "before the fsync": (os, "fsync"),
    "before the rename": (os, "replace"),
    "after the rename": (tdfx.checkpoint.atomic, "_sync_folder"),
    "inside the rewrite": (tdfx.passes.transform.rewrite, "_emit"),
    "inside the optimizer": (tdfx.optim.companions, "prepare_surgery"),
}


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            if "place" in request:
                die_at(request["place"], request["count"])
            train(Path(request["folder"]), request["optimizer"], forget=request.get("forget", False))
            os._exit(0)
        if "delay" in request:
            time.sleep(request["delay"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

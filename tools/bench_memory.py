"""How much memory a switch takes, beside what a training step takes anyway.

Each model trains for two steps of AdamW, so that its state is there, is planned, rewritten, trained and merged, in float32
on the CPU. What is counted is the bytes of tensors that are alive (tools/live_bytes.py), which is the same on every device;
no allocator's rounding and no kernel's scratch memory is in it. Two readings, in multiples of the largest site's weight:

``above a step``: the peak less that of a step of the dense model. Negative where a step takes more than the switch.
``at work``: the peak less what was there before and what was made to stay, which are the new weights with their gradients
and their optimizer's state. Old and new are there together for a moment, because a failure must change nothing.

Planning runs the model once on the example inputs, without gradients, and what is alive then is counted too. Takes about
3 minutes on one core, most of them for the training steps, and 4 GB.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import torch
from bench_pass import build, trained
from live_bytes import LiveBytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import tdfx
from tdfx.ranks.registry import parse_rule


@dataclass(frozen=True, slots=True)
class Reading:
    """What one call took, in bytes."""

    peak: int
    """The most that was alive during the call."""
    at_work: int
    """What of that was neither there before nor kept."""


def held(model: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield every tensor that a run keeps from step to step."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        yield from (one for one in optimizer.state.get(parameter, {}).values() if isinstance(one, Tensor))
    yield from model.buffers()


def reading(live: LiveBytes, call: Callable[[], object]) -> tuple[Reading, Any]:
    """Make a call, and return what it took and what it gave."""
    gc.collect()
    before = live.begin()
    result = call()
    peak = live.peak
    gc.collect()
    return Reading(peak, peak - max(before, live.now)), result


def step(model: nn.Module, optimizer: Optimizer, images: Tensor) -> None:
    """Train for one step."""
    optimizer.zero_grad()
    labels = torch.arange(len(images)) % 10
    torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
    optimizer.step()


def measure(name: str, policy: tdfx.Policy, batch: int) -> tuple[float, dict[str, Reading]]:
    """Return the bytes of the largest site's weight, and what each call took."""
    torch.manual_seed(0)
    dense, size = build(name)
    optimizer = AdamW(trained(dense).parameters(), lr=1e-4)
    images = torch.randn(batch, 3, size, size)
    step(dense, optimizer, images)
    found = {}
    with LiveBytes([*held(dense, optimizer), images]) as live:
        found["step"], _ = reading(live, partial(step, dense, optimizer, images))
        found["plan"], plan = reading(live, partial(tdfx.plan, dense, policy, example_inputs=images))
        replaced = list(held(dense, optimizer))
        rewrite = partial(tdfx.rewrite, dense, policy, example_inputs=images, optimizer=optimizer)
        found["rewrite"], small = reading(live, rewrite)
        del dense, rewrite, replaced
        step(small, optimizer, images)
        replaced = list(held(small, optimizer))
        found["merge"], _ = reading(live, partial(tdfx.merge, small, optimizer=optimizer))
        del replaced
    largest = max(one.parameters_before for one in plan.factorized)
    return largest * images.element_size(), found


@click.command(help=__doc__)
@click.option(
    "--models", default="cifar-vgg19,resnet50,vit_b_16", show_default=True, help="Names, of torchvision or cifar-vgg19."
)
@click.option("--policy", default="ratio:0.25", show_default=True, help="A rank rule, as for tdfx inspect.")
@click.option("--batch", default=16, show_default=True, help="Images in a step.")
def main(models: str, policy: str, batch: int) -> None:
    """Measure each model, and print the table."""
    torch.set_num_threads(1)
    rule = tdfx.Policy(rank=parse_rule(policy), min_gain=0)
    calls = ("plan", "rewrite", "merge")
    table = Table("", "largest", "a step", "above a step:", "", "", "at work:", "", "", box=None)
    table.add_row("model", "site MB", "MB", *calls, *calls)
    for name in models.split(","):
        largest, found = measure(name, rule, batch)
        own = found["step"].peak
        above = [f"{(found[one].peak - own) / largest:+.1f}" for one in calls]
        at_work = [f"{found[one].at_work / largest:.1f}" for one in calls]
        table.add_row(name, f"{largest / 1e6:.1f}", f"{own / 1e6:.0f}", *above, *at_work)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

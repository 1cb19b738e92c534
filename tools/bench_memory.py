"""Measure how much memory a switch takes, compared with what a training step takes.

Each model trains for two steps of AdamW, so that the optimizer has state. Then it is planned, rewritten, trained for a step
and merged, in float32 on the CPU. The figures count the bytes of live tensors, which are the same on
every device; they contain neither the rounding of an allocator nor the scratch memory of kernels. There are two, in
multiples of the largest site's weight:

``above a step``: the peak minus the peak of a dense training step. Negative where a step takes more than the switch.
``at work``: the peak minus what was live before and what stays, which is the new weights with their gradients and their
optimizer state. Old and new are live together for a moment, because a failure must change nothing.

Planning runs the model once on the example inputs, without gradients, and that counts too. Networks: VGG-19 for 32×32
images, and torchvision's ResNet-50 and ViT-B/16. Takes about 3 minutes on one core, and 4 GB.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import options
import torch
from nets import build, with_trained_spectra
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import tdfx
from tdfx.ranks.registry import parse_rule


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is active, the bytes of every tensor that is created, until its storage is freed.

    It watches storages and not tensors, so that views count once, and what only autograd holds counts too. Scratch memory
    that a kernel frees before it returns is not seen.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes that are live now."""
        self.peak = 0
        """The most bytes that were live since the last ``begin``."""
        self._storages: set[int] = set()
        for tensor in existing:
            self._watch(tensor)

    def begin(self) -> int:
        """Reset the peak, and return the bytes that are live."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._watch, result)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # torch returns the same object for a storage as long as anything holds it, autograd included.
        key = id(storage)
        if not tensor.is_meta and key not in self._storages:
            self._storages.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, count: int) -> None:
        self._storages.discard(key)
        self.now -= count


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The memory of one call, in bytes."""

    peak: int
    """The most that was live during the call."""
    at_work: int
    """The part of the peak that was neither live before nor is live afterwards."""


def kept_tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield every tensor that a training run keeps from step to step."""
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        yield from (value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor))
    yield from model.buffers()


def measure_call(live: LiveBytes, call: Callable[[], object]) -> tuple[MemoryReading, Any]:
    """Make a call, and return its memory and its result."""
    gc.collect()
    before = live.begin()
    result = call()
    peak = live.peak
    gc.collect()
    return MemoryReading(peak, peak - max(before, live.now)), result


def step(model: nn.Module, optimizer: Optimizer, images: Tensor) -> None:
    """Train for one step."""
    optimizer.zero_grad()
    labels = torch.arange(len(images)) % 10
    torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
    optimizer.step()


def measure_model(name: str, policy: tdfx.Policy, batch: int) -> tuple[float, dict[str, MemoryReading]]:
    """Return the bytes of the largest site's weight, and the memory of each call."""
    torch.manual_seed(0)
    dense, size = build(name, classes=10)
    optimizer = AdamW(with_trained_spectra(dense).parameters(), lr=1e-4)
    images = torch.randn(batch, 3, size, size)
    step(dense, optimizer, images)
    readings = {}
    with LiveBytes([*kept_tensors(dense, optimizer), images]) as live:
        readings["step"], _ = measure_call(live, partial(step, dense, optimizer, images))
        readings["plan"], plan = measure_call(live, partial(tdfx.plan, dense, policy, example_inputs=images))
        # The caller holds the replaced tensors until after the call, as a training script may.
        replaced = list(kept_tensors(dense, optimizer))
        rewrite = partial(tdfx.rewrite, dense, policy, example_inputs=images, optimizer=optimizer)
        readings["rewrite"], rewritten = measure_call(live, rewrite)
        del dense, rewrite, replaced
        step(rewritten, optimizer, images)
        replaced = list(kept_tensors(rewritten, optimizer))
        readings["merge"], _ = measure_call(live, partial(tdfx.merge, rewritten, optimizer=optimizer))
        del replaced
    largest = max(site.parameters_before for site in plan.factorized)
    return largest * images.element_size(), readings


@options.command(__doc__)
@options.networks("--models", "cifar-vgg19,resnet50,vit_b_16")
@click.option("--policy", default="ratio:0.25", help="A rank rule, as for tdfx inspect.")
@click.option("--batch", default=16, help="Images in a step.")
def main(models: str, policy: str, batch: int) -> None:
    """Measure each model, and print the table."""
    torch.set_num_threads(1)
    parsed = tdfx.Policy(rank=parse_rule(policy), min_gain=0)
    calls = ("plan", "rewrite", "merge")
    table = Table("", "largest", "a step", "above a step:", "", "", "at work:", "", "", box=None)
    table.add_row("model", "site MB", "MB", *calls, *calls)
    for name in models.split(","):
        largest, readings = measure_model(name, parsed, batch)
        step_peak = readings["step"].peak
        above = [f"{(readings[call].peak - step_peak) / largest:+.1f}" for call in calls]
        at_work = [f"{readings[call].at_work / largest:.1f}" for call in calls]
        table.add_row(name, f"{largest / 1e6:.1f}", f"{step_peak / 1e6:.0f}", *above, *at_work)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

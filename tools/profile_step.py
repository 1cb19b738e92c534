"""Show where the time of a training step goes, dense and factorized: products, norms, attention, activations, copies.

Every operation of torch is timed by itself, forward and backward, in channels last. "GFLOP/s" is how fast the products are
computed, dense and factorized. Below each table stands how many times faster the step would be if the products of the
factors ran as fast as the dense network's, and as fast as this machine multiplies two large matrices, and all else took as
long as it does: more cannot be had at these ranks. Takes two minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import options
import torch
import torch.nn.functional as F
from bench_common import Clock, clock_name, make_table, set_clock, write_results
from nets import build
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tdfx

BATCHES = {"resnet50": 8, "vit_b_16": 4}
_OTHER_BATCH = 8
OPTIMIZER, REST = "optimizer", "rest"
PRODUCTS = ("1x1 convolutions", "other convolutions", "matrix products")
PARTS = {
    "attention": ("scaled_dot_product",),
    "batch norm": ("batch_norm",),
    "layer norm": ("layer_norm",),
    "activations": ("relu", "threshold", "gelu", "silu", "hardtanh", "hardswish", "sigmoid"),
    "pooling": ("pool",),
    "copies": ("copy", "clone", "cat", "contiguous", "fill", "zero"),
    "sums, additions": ("add", "sum", "mean", "mul", "div"),
}
"""Other part of a step -> parts of the names of its operations; the first that fits counts."""
_SIDE = 1024
"""Rows and columns of the large matrices."""


@dataclass(slots=True)
class Profile:
    """The times of one step."""

    whole: float = 0.0
    """Seconds of the step as it runs otherwise."""
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PRODUCTS, *PARTS, OPTIMIZER, REST), 0.0))
    """Part -> seconds; the rest is what lies between the operations of torch, and those of no part."""
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PRODUCTS, 0.0))
    """Kind of product -> floating-point operations, forward and backward."""

    @property
    def in_products(self) -> float:
        """Seconds of all products."""
        return sum(self.parts[kind] for kind in PRODUCTS)

    @property
    def rate(self) -> float:
        """Floating-point operations of all products in a second."""
        return sum(self.flops.values()) / self.in_products


class _OperationTimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the time of every operation in a profile."""

    def __init__(self, profile: Profile, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.profile = profile
        self.clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        began = self.clock()
        out = func(*args, **named)
        seconds = self.clock() - began
        part = part_of(func.overloadpacket.__name__, args)
        self.profile.parts[part] += seconds
        if part in PRODUCTS:
            self.profile.flops[part] += flop_registry[func.overloadpacket](*args, **named, out_val=out)
        return out


def part_of(operation: str, args: Sequence[Any]) -> str:
    """Return the part of the step that an operation belongs to.

    >>> images, weight = torch.empty(2, 4, 9, 9), torch.empty(8, 4, 1, 1)
    >>> part_of("convolution", [images, weight]), part_of("convolution_backward", [images, images, weight])
    ('1x1 convolutions', '1x1 convolutions')
    >>> part_of("addmm", []), part_of("native_batch_norm", []), part_of("view", [])
    ('matrix products', 'batch norm', 'rest')
    """
    if operation.startswith("convolution"):
        weight: Tensor = args[2 if operation.endswith("backward") else 1]
        return PRODUCTS[weight[0, 0].numel() > 1]
    if operation.endswith("mm"):
        return PRODUCTS[-1]
    return next((part for part, names in PARTS.items() if any(name in operation for name in names)), REST)


def profile_step(model: nn.Module, x: Tensor, rounds: int, clock: Clock) -> Profile:
    """Time the steps of a model, whole and by operations in turns; the smallest times count, and the first step does not."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long)

    def step(operations: AbstractContextManager[object]) -> tuple[float, float]:
        """Return the seconds of forward and backward, and of the optimizer."""
        began = clock()
        with operations:
            F.cross_entropy(model(x), target).backward()  # type: ignore[no-untyped-call]
        between = clock()
        optimizer.step()
        optimizer.zero_grad()
        return between - began, clock() - between

    step(nullcontext())
    profiles = [Profile() for _ in range(rounds)]
    for profile in profiles:
        gradients, update = step(nullcontext())
        step(_OperationTimes(profile, clock))
        profile.whole = gradients + update
        profile.parts |= {OPTIMIZER: update, REST: 0.0}
    least = {part: min(profile.parts[part] for profile in profiles) for part in profiles[0].parts}
    whole = min(profile.whole for profile in profiles)
    return Profile(whole, {**least, REST: max(0.0, whole - sum(least.values()))}, profiles[0].flops)


def best_rate(clock: Clock) -> float:
    """Return how many floating-point operations in a second this machine computes in a large matrix product."""
    a, b = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)

    def seconds() -> float:
        began = clock()
        torch.mm(a, b)
        return clock() - began

    return 2 * _SIDE**3 / min(seconds() for _ in range(12))


def limit(dense: Profile, factorized: Profile, rate: float) -> float:
    """Return how many times faster the step would be with the products of the factors at a rate, if that is higher."""
    products = sum(factorized.flops.values()) / max(rate, factorized.rate)
    return dense.whole / (factorized.whole - factorized.in_products + products)


@options.command(__doc__)
@options.networks("--nets", "resnet50,vit_b_16", ", separated by commas")
@options.share(0.25)
@options.batch
@options.threads(1)
@options.rounds(2, "steps of each kind")
@options.cpu_time
@options.json_file("Write the times to a file.")
def main(
    nets: str, share: float, batch: int | None, threads: int, rounds: int, cpu_time: bool, json_file: Path | None
) -> None:
    """Profile each network, and print a table for each."""
    clock = set_clock(cpu_time, threads)
    best = best_rate(clock)
    results = []
    for name in nets.split(","):
        torch.manual_seed(0)
        model, side = build(name)
        x = torch.randn(batch or BATCHES.get(name, _OTHER_BATCH), 3, side, side)
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        policy = tdfx.Policy(rank=tdfx.Ratio(of=share), cost=tdfx.Modelled())
        factorized = tdfx.rewrite(model, policy, example_inputs=(x,))
        before, after = (profile_step(each, x, rounds, clock) for each in (model, factorized))
        Console(width=120).print(make_table(_rows(name, before, after)))
        as_dense, as_matrices = (limit(before, after, rate) for rate in (before.rate, best))
        click.echo(
            f"batch {len(x)}: {before.whole / after.whole:.2f}x faster; {as_dense:.2f}x with products as fast as "
            f"the dense ones, {as_matrices:.2f}x as fast as large matrices ({best / 1e9:.0f} GFLOP/s)"
        )
        results.append(
            {
                "net": name,
                "batch": len(x),
                "limit_dense_rate": as_dense,
                "limit_best_rate": as_matrices,
                "dense": asdict(before),
                "factorized": asdict(after),
            }
        )
    write_results(json_file, results, clock=clock_name(cpu_time), share=share, best_rate=best)


def _rows(name: str, dense: Profile, factorized: Profile) -> Iterator[dict[str, str]]:
    for part, after in factorized.parts.items():
        before = dense.parts[part]
        if max(before, after) >= 0.005 * factorized.whole:
            rates = [
                f"{each.flops[part] / each.parts[part] / 1e9:.0f}" for each in (dense, factorized) if _has(each, part)
            ]
            yield _row(name, part, before, after, after / factorized.whole, ", ".join(rates))
    rates = [f"{each.rate / 1e9:.0f}" for each in (dense, factorized)]
    yield _row(name, "whole step; all products", dense.whole, factorized.whole, 1.0, ", ".join(rates))


def _has(profile: Profile, part: str) -> bool:
    return profile.flops.get(part, 0.0) > 0


def _row(name: str, part: str, before: float, after: float, share: float, rates: str) -> dict[str, str]:
    return {
        name: part,
        "dense ms": f"{1e3 * before:.0f}",
        "tdfx ms": f"{1e3 * after:.0f}",
        "of tdfx's step": f"{share:.0%}",
        "GFLOP/s": rates,
    }


if __name__ == "__main__":
    main()

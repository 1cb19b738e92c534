"""How long the pass itself takes, beside the usual way: full SVDs for EVBMF's ranks, and tensorly's iterated Tucker.

All ways get the same trained-looking weights and the same threads, in turns in one process. The usual way is what published
code does: NumPy's SVD of both unfoldings of each convolution for the ranks, as in the EVBMF that everybody copies, then
``partial_tucker`` at these ranks; one SVD for each linear and 1×1 layer. As published the SVD forms all of V; where that
would take more than 1 GiB, and in the second column everywhere, it forms no more than it needs, in favour of the usual way.
tdfx plans and rewrites. A training step of the same model follows, because that is what the rewrite's price has to be held
against.

``cifar-vgg19`` is VGG-19 for 32×32 images, with one linear layer at its end. Takes about 4 minutes on one core, and 20 with
``--models vgg19``, for its linear layer of 25088×4096.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import click
import numpy as np
import tensorly as tl
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import tdfx
from tdfx.ranks.evbmf import evbmf_rank

PART = 16
"""Images that go through the network at a time."""
POLICY = tdfx.Policy(rank=tdfx.VBMF(), min_gain=0)


def trained(model: nn.Module) -> nn.Module:
    """Give every weight a decaying spectrum above its noise, as training does; random weights have no rank to find."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            flat = layer.weight.detach().flatten(1)
            rank = max(1, min(flat.shape) // 4)
            strength = torch.linspace(1.0, 0.1, rank)
            signal = (torch.randn(flat.shape[0], rank) * strength) @ torch.randn(rank, flat.shape[1]) / rank**0.5
            layer.weight.data = (signal + 0.1 * torch.randn_like(flat)).reshape(layer.weight.shape) * flat.std()
    return model


def usual_way(model: nn.Module, published: bool) -> None:
    """Find ranks by SVDs and factors by tensorly, for every convolution with a kernel and every matrix."""
    with tl.backend_context("pytorch"):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                weight = layer.weight.detach()
                if weight.dim() == 2 or weight[0, 0].numel() == 1:
                    usual_rank(weight.flatten(1), published)
                else:
                    unfoldings = weight.flatten(1), weight.transpose(0, 1).flatten(1)
                    ranks = [usual_rank(one, published) for one in unfoldings]
                    partial_tucker(weight, rank=ranks, modes=[0, 1], init="svd")


def usual_rank(matrix: Tensor, published: bool) -> int:
    """Return the rank that tdfx's floor leaves of EVBMF's, from an SVD."""
    whole = published and 4 * max(matrix.shape) ** 2 <= 2**30
    _, values, _ = np.linalg.svd(matrix.numpy(), full_matrices=whole)
    return max(evbmf_rank(torch.from_numpy(values), *matrix.shape), -(-len(values) // 4))


def build(name: str) -> tuple[nn.Module, int]:
    """Return a model and the side of its images, in pixels."""
    if name == "cifar-vgg19":
        features = torchvision.models.vgg19(weights=None).features
        return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)), 32
    return cast("nn.Module", torchvision.models.get_model(name, weights=None, num_classes=10)), 224


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def training_step(model: nn.Module, batch: int, size: int) -> float:
    """Return the seconds of one training step, its images in parts that fit into memory, gradients added up."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def part(images: int) -> None:
        labels = torch.randint(0, 10, (images,))
        loss = nn.functional.cross_entropy(model(torch.randn(images, 3, size, size)), labels)
        loss.backward()  # type: ignore[no-untyped-call]

    def step() -> None:
        optimizer.zero_grad()
        for start in range(0, batch, PART):
            part(min(PART, batch - start))
        optimizer.step()

    part(2)  # to warm up
    return timed(step)


@click.command(help=__doc__)
@click.option(
    "--models", default="cifar-vgg19,resnet50", show_default=True, help="Names, of torchvision or cifar-vgg19."
)
@click.option("--rounds", default=1, show_default=True, help="Times that each way runs, in turns; medians are shown.")
@click.option("--batch", default=128, show_default=True, help="Images in the training step.")
@click.option("--threads", default=1, show_default=True)
def main(models: str, rounds: int, batch: int, threads: int) -> None:
    """Time all ways on each model, and print the table."""
    torch.set_num_threads(threads)
    tdfx.rewrite(nn.Linear(16, 16), POLICY)  # to warm up
    table = Table(
        "model", "published s", "reduced s", "tdfx s", "times faster", f"step of {batch} s", "rewrite / step", box=None
    )
    for name in models.split(","):
        torch.manual_seed(0)
        model, size = build(name)
        trained(model)
        ways = partial(usual_way, model, True), partial(usual_way, model, False), partial(tdfx.rewrite, model, POLICY)
        times = [[timed(way) for way in ways] for _ in range(rounds)]
        published, reduced, ours = (statistics.median(one) for one in zip(*times, strict=True))
        step = training_step(model, batch, size)
        faster = f"{published / ours:.1f}, {reduced / ours:.1f}"
        table.add_row(
            name, f"{published:.2f}", f"{reduced:.2f}", f"{ours:.2f}", faster, f"{step:.2f}", f"{ours / step:.2f}"
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

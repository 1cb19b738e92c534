"""How long the pass itself takes, beside the usual way: a full SVD for EVBMF's ranks, and tensorly's iterated Tucker.

Both ways get the same trained-looking weights and the same threads, in turns in one process. The usual way is what the
published code does: for each convolution a full SVD of both unfoldings for the ranks, then ``partial_tucker`` at these
ranks; for each linear layer one full SVD. tdfx plans and rewrites. A training step of the same model follows, because that
is what the rewrite's price has to be held against. Takes about 15 minutes on one core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import click
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


def usual_way(model: nn.Module) -> None:
    """Find ranks by full SVDs and factors by tensorly, for every convolution with a kernel and every matrix."""
    with tl.backend_context("pytorch"):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                weight = layer.weight.detach()
                if weight.dim() == 2 or weight[0, 0].numel() == 1:
                    usual_rank(weight.flatten(1))
                else:
                    ranks = [usual_rank(weight.flatten(1)), usual_rank(weight.transpose(0, 1).flatten(1))]
                    partial_tucker(weight, rank=ranks, modes=[0, 1], init="svd")


def usual_rank(matrix: Tensor) -> int:
    """Return the rank that tdfx's floor leaves of EVBMF's, from a full SVD."""
    _, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return max(evbmf_rank(values, *matrix.shape), -(-len(values) // 4))


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
@click.option("--models", default="vgg19,resnet50", show_default=True, help="Names of torchvision models.")
@click.option("--rounds", default=1, show_default=True, help="Times that each way runs, in turns; medians are shown.")
@click.option("--batch", default=128, show_default=True, help="Images in the training step.")
@click.option("--size", default=224, show_default=True, help="Side of the images, in pixels.")
@click.option("--threads", default=1, show_default=True)
def main(models: str, rounds: int, batch: int, size: int, threads: int) -> None:
    """Time both ways on each model, and print the table."""
    torch.set_num_threads(threads)
    table = Table(
        "model", "usual s", "tdfx s", "times faster", f"step s, {batch} × {size} px", "rewrite / step", box=None
    )
    for name in models.split(","):
        torch.manual_seed(0)
        model = trained(cast("nn.Module", torchvision.models.get_model(name, weights=None, num_classes=10)))
        times = [(timed(partial(usual_way, model)), timed(partial(tdfx.rewrite, model, POLICY))) for _ in range(rounds)]
        usual, ours = (statistics.median(one) for one in zip(*times, strict=True))
        step = training_step(model, batch, size)
        figures = (usual, ours, usual / ours, step, ours / step)
        table.add_row(name, *(f"{one:.2f}" for one in figures))
    Console().print(table)


if __name__ == "__main__":
    main()

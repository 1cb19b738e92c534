"""Measure how long a rewrite takes, compared with the usual way: full SVDs for EVBMF ranks, then tensorly's iterated Tucker.

All ways get the same weights, with spectra as after training, and run in turns. The usual way is what published code does:
NumPy's SVD of both unfoldings of each convolution for the ranks, then ``partial_tucker`` at these ranks; one SVD for each
linear and 1×1 layer. As published ("published s") the SVD forms all of V. Where that would take more than 1 GiB, and
everywhere in the second column ("reduced s"), it forms only the part that is needed, which is in favour of the usual way.
tdfx plans and rewrites. The last columns compare that with a training step of the same model.

Networks: ``cifar-vgg19`` is VGG-19 for 32×32 images with one linear layer at its end, ``resnet50`` is torchvision's.
Takes about 4 minutes on one core, and 20 with ``--models vgg19``, because of its linear layer of 25088×4096.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import numpy as np
import options
import tensorly as tl
import torch
from bench_common import make_table
from nets import build, with_trained_spectra
from rich.console import Console
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import tdfx
from tdfx.ranks.evbmf import evbmf_rank

PART = 16
"""Images that go through the network at a time."""
POLICY = tdfx.Policy(rank=tdfx.VBMF(), min_gain=0)


def usual_way(model: nn.Module, published: bool) -> None:
    """Find ranks by SVDs and factors by tensorly, for every convolution and linear layer."""
    with tl.backend_context("pytorch"):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                weight = layer.weight.detach()
                if weight.dim() == 2 or weight[0, 0].numel() == 1:
                    usual_rank(weight.flatten(1), published)
                else:
                    unfoldings = weight.flatten(1), weight.transpose(0, 1).flatten(1)
                    ranks = [usual_rank(unfolding, published) for unfolding in unfoldings]
                    partial_tucker(weight, rank=ranks, modes=[0, 1], init="svd")


def usual_rank(matrix: Tensor, published: bool) -> int:
    """Return the EVBMF rank of a matrix from its SVD, raised to the floor that tdfx has."""
    full = published and 4 * max(matrix.shape) ** 2 <= 2**30
    _, values, _ = np.linalg.svd(matrix.numpy(), full_matrices=full)
    return max(evbmf_rank(torch.from_numpy(values), *matrix.shape), -(-len(values) // 4))


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def step_seconds(model: nn.Module, batch: int, size: int) -> float:
    """Return the seconds of one training step. Gradients are accumulated over parts of the batch that fit into memory."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def accumulate(images: int) -> None:
        outputs = model(torch.randn(images, 3, size, size))
        torch.autograd.backward(nn.functional.cross_entropy(outputs, torch.randint(0, 10, (images,))))

    def step() -> None:
        optimizer.zero_grad()
        for start in range(0, batch, PART):
            accumulate(min(PART, batch - start))
        optimizer.step()

    accumulate(2)  # to warm up
    return seconds_of(step)


@options.command(__doc__)
@options.networks("--models", "cifar-vgg19,resnet50")
@click.option("--rounds", default=1, help="Runs of each way, in turns; medians are shown.")
@click.option("--batch", default=128, help="Images in the training step.")
@options.threads(1)
def main(models: str, rounds: int, batch: int, threads: int) -> None:
    """Time all ways on each model, and print the table."""
    torch.set_num_threads(threads)
    tdfx.rewrite(nn.Linear(16, 16), POLICY)  # to warm up
    rows = []
    for name in models.split(","):
        torch.manual_seed(0)
        model, size = build(name, classes=10)
        with_trained_spectra(model)
        ways = partial(usual_way, model, True), partial(usual_way, model, False), partial(tdfx.rewrite, model, POLICY)
        seconds = [[seconds_of(way) for way in ways] for _ in range(rounds)]
        published, reduced, ours = (statistics.median(column) for column in zip(*seconds, strict=True))
        step = step_seconds(model, batch, size)
        row = {"model": name, "published s": f"{published:.2f}", "reduced s": f"{reduced:.2f}", "tdfx s": f"{ours:.2f}"}
        row |= {"times faster": f"{published / ours:.1f}, {reduced / ours:.1f}", f"step of {batch} s": f"{step:.2f}"}
        rows.append({**row, "rewrite / step": f"{ours / step:.2f}"})
    Console(width=110).print(make_table(rows))


if __name__ == "__main__":
    main()

"""Compare two ways to compute a 1x1 factor on a CPU: torch's convolution, and a matrix product on the channels-last view.

Forward and backward of each shape, in turns; the smallest times count. The rule in tdfx/factors/functions.py, which takes a
product where there are few samples times positions, stands on these figures. Takes half a minute on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import click
import options
import torch
import torch.nn.functional as F
from bench_common import Clock, clock_name, make_table, set_clock, write_results
from rich.console import Console
from torch import Tensor

from tdfx.factors.functions import MOST_ROWS, pointwise_product, product_is_faster

CHANNELS = ((64, 16), (16, 64), (128, 32), (256, 64), (64, 256), (512, 128), (1024, 256))
IMAGES = ((8, 56), (8, 28), (8, 14), (8, 7), (32, 32), (32, 16), (32, 8), (32, 4), (128, 14), (128, 7))
"""Samples and height; images are square."""
MOST_VALUES = 2**25
"""Shapes with more values than this are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The times of one shape, in seconds."""

    samples: int
    height: int
    in_channels: int
    out_channels: int
    convolution: float
    product: float
    takes_product: bool
    """What the rule takes."""


def time_shape(samples: int, height: int, channels: tuple[int, int], rounds: int, clock: Clock) -> Row:
    """Time both ways for one shape."""
    inputs, outputs = channels
    x = torch.randn(samples, inputs, height, height).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 1, 1, requires_grad=True)
    gradient = torch.randn(samples, outputs, height, height).contiguous(memory_format=torch.channels_last)
    takes_product = product_is_faster(x)
    x.requires_grad_()

    def seconds(compute: Callable[[Tensor, Tensor], Tensor]) -> float:
        began = clock()
        torch.autograd.grad(compute(x, weight), (x, weight), gradient)
        return clock() - began

    times = [(seconds(F.conv2d), seconds(pointwise_product)) for _ in range(rounds + 1)][1:]
    convolution, matrix_product = map(min, zip(*times, strict=True))
    return Row(
        samples=samples,
        height=height,
        in_channels=inputs,
        out_channels=outputs,
        convolution=convolution,
        product=matrix_product,
        takes_product=takes_product,
    )


@options.command(__doc__)
@options.threads(2)
@options.rounds(15, "steps of each shape")
@options.cpu_time
@options.json_file("Write the times to a file.")
def main(threads: int, rounds: int, cpu_time: bool, json_file: Path | None) -> None:
    """Time all shapes, and print a table."""
    clock = set_clock(cpu_time, threads)
    rows = [
        time_shape(samples, height, channels, rounds, clock)
        for (samples, height), channels in product(IMAGES, CHANNELS)
        if samples * height * height * max(channels) <= MOST_VALUES
    ]
    Console(width=120).print(make_table(map(_cells, rows)))
    wrong = [row for row in rows if row.takes_product != (row.product < row.convolution)]
    worst = max((max(row.product / row.convolution, row.convolution / row.product) for row in wrong), default=1.0)
    click.echo(
        f"Products up to {MOST_ROWS} rows: not the faster way for {len(wrong)} of {len(rows)}, by up to {worst:.2f}x."
    )
    write_results(json_file, [asdict(row) for row in rows], clock=clock_name(cpu_time), most_rows=MOST_ROWS)


def _cells(row: Row) -> dict[str, str]:
    return {
        "samples": str(row.samples),
        "height": str(row.height),
        "channels": f"{row.in_channels} -> {row.out_channels}",
        "rows": str(row.samples * row.height**2),
        "convolution ms": f"{1e3 * row.convolution:.2f}",
        "product ms": f"{1e3 * row.product:.2f}",
        "product faster": f"{row.convolution / row.product:.2f}x",
        "taken": "product" if row.takes_product else "convolution",
    }


if __name__ == "__main__":
    main()

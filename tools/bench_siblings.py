"""Time the first factors of layers that read the same input: each by itself, and side by side as one matrix product.

Query, key and value of an attention read one input, and so do the gate and the up projection of a gated MLP. The product of
the input with all their first factors, one below the other, holds what each would have computed. Here both ways are timed in
turns, forward and backward: the layers alone, and whole training steps of small transformers, with separate and with gated
layers. tdfx computes each layer by itself: whole steps gain a few percent at most. Takes two minutes on one core.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import cast

import click
import options
import torch
import torch.nn.functional as F
from bench_common import Clock, clock_name, make_table, set_clock, write_results
from rich.console import Console
from torch import Tensor, nn

import tdfx

LENGTH = 64
"""Tokens in a sequence."""
CHAINS = ((256, 64), (256, 128), (512, 64), (512, 128), (512, 192), (768, 64), (768, 128), (768, 192))
"""Width, and rank of each layer, of three layers as wide as their input."""
STEPS = ((128, 4, 0.25), (256, 16, 0.25), (512, 16, 0.125))
"""Width, sequences in a batch, and share of the full ranks, of transformers of two blocks."""
SEQUENCES = (2, 16)
"""Sequences in a batch of the layers alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The times of one computation, in seconds: medians over the rounds."""

    what: str
    width: int
    ranks: str
    tokens: int
    alone: float
    joined: float
    gain: float
    """How many times faster the joined computation is: the median over pairs of rounds."""
    low: float
    """The gain at the tenth percentile of resampled rounds."""
    high: float
    """The same at the ninetieth."""


def project(x: Tensor, layers: Sequence[nn.Module], joined: bool) -> list[Tensor]:
    """Apply factorized linear layers to one input (..., in), their first factors one by one or as one product."""
    if not joined:
        return [layer(x) for layer in layers]
    chains = [cast("tdfx.Factorized", layer).factors for layer in layers]
    firsts = [cast("Tensor", chain[0].weight) for chain in chains]
    # Of two dimensions, because torch adds a bias to a product of more in a pass of its own where rows are strided.
    parts = torch.split(F.linear(x.flatten(0, -2), torch.cat(firsts)), [len(weight) for weight in firsts], -1)
    return [chain[1](part).unflatten(0, x.shape[:-1]) for chain, part in zip(chains, parts, strict=True)]


class Block(nn.Module):
    """A block of a transformer whose query, key and value, and gate if it has one, are layers of their own."""

    joined = False

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.heads = width // 64
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        hidden = 8 * width // 3 // 16 * 16 if gated else 4 * width
        self.read = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.write = nn.Linear(width, width)
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(2 if gated else 1))
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, length, width) to the same shape."""
        reads = project(self.norms[0](x), list(self.read), self.joined)
        q, k, v = (read.view(*x.shape[:-1], self.heads, -1).transpose(1, 2) for read in reads)
        x = x + self.write(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        up, *gate = project(self.norms[1](x), list(self.up), self.joined and len(self.up) > 1)
        return x + self.down(F.silu(gate[0]) * up if gate else F.gelu(up))  # type: ignore[no-any-return]


def in_turns(run: Callable[[bool], object], rounds: int, clock: Clock) -> dict[str, float]:
    """Time both ways in turns, the first round left out, and return the times and gains of a ``Row``."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for joined in (True, False) if number % 2 else (False, True):
            began = clock()
            run(joined)
            times[joined].append(clock() - began)
    alone, joined_times = times[False][1:], times[True][1:]
    gains = [a / b for a, b in zip(alone, joined_times, strict=True)]
    draw = random.Random(0)
    resampled = sorted(median(draw.choices(gains, k=rounds)) for _ in range(500))
    return {
        "alone": median(alone),
        "joined": median(joined_times),
        "gain": median(gains),
        "low": resampled[50],
        "high": resampled[450],
    }


def factorized(model: nn.Module, rank: tdfx.RankRule) -> nn.Module:
    """Return a model with every linear layer factorized, in its own class."""
    return tdfx.rewrite(model, tdfx.Policy(rank=rank, min_gain=0, round_to=1), emit="modules")


def time_layers(width: int, rank: int, sequences: int, rounds: int, clock: Clock) -> Row:
    """Time three layers that read one input."""
    layers = factorized(nn.ModuleList(nn.Linear(width, width) for _ in range(3)), tdfx.Fixed(ranks={"*": rank}))
    x = torch.randn(sequences, LENGTH, width, requires_grad=True)
    gradients = [torch.randn(sequences, LENGTH, width) for _ in range(3)]
    leaves = [x, *layers.parameters()]

    def run(joined: bool) -> None:
        torch.autograd.grad(project(x, list(layers.children()), joined), leaves, gradients)

    times = in_turns(run, rounds, clock)
    return Row(what="three layers", width=width, ranks=str(rank), tokens=sequences * LENGTH, **times)


def time_step(width: int, sequences: int, share: float, gated: bool, rounds: int, clock: Clock) -> Row:
    """Time the training steps of a transformer of bytes with two blocks, AdamW included."""
    blocks = [Block(width, gated) for _ in range(2)]
    layers = [nn.Embedding(256, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 256)]
    model = factorized(nn.Sequential(*layers), tdfx.Ratio(of=share))
    rewritten = [block for block in model.children() if isinstance(block, Block)]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randint(256, (sequences, LENGTH))

    def run(joined: bool) -> None:
        for block in rewritten:
            block.joined = joined
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    times = in_turns(run, rounds, clock)
    what = "step, q k v and gate, up" if gated else "step, q k v"
    return Row(what=what, width=width, ranks=f"{share:g} of full", tokens=sequences * LENGTH, **times)


@options.command(__doc__)
@options.threads(1)
@options.rounds(40, "runs of each way")
@options.cpu_time
@options.json_file("Write the times to a file.")
def main(threads: int, rounds: int, cpu_time: bool, json_file: Path | None) -> None:
    """Time layers and steps, and print a table."""
    clock = set_clock(cpu_time, threads)
    torch.manual_seed(0)
    layers = [partial(time_layers, *chain, sequences) for sequences in SEQUENCES for chain in CHAINS]
    steps = [partial(time_step, *step, gated) for gated in (False, True) for step in STEPS]
    rows: list[Row] = []
    for timed in (*steps, *layers):
        rows.append(timed(rounds=rounds, clock=clock))
        write_results(json_file, [asdict(row) for row in rows], clock=clock_name(cpu_time))
    Console(width=120).print(make_table(map(_cells, rows)))
    groups = {what: [row.gain for row in rows if row.what == what] for what in dict.fromkeys(row.what for row in rows)}
    click.echo(", ".join(f"{what}: {median(gains):.2f}x in the median" for what, gains in groups.items()))


def _cells(row: Row) -> dict[str, str]:
    return {
        "what": row.what,
        "width": str(row.width),
        "ranks": row.ranks,
        "tokens": str(row.tokens),
        "alone ms": f"{1e3 * row.alone:.1f}",
        "joined ms": f"{1e3 * row.joined:.1f}",
        "gain": f"{row.gain:.2f}x",
        "80 % of resampled": f"{row.low:.2f} to {row.high:.2f}",
    }


if __name__ == "__main__":
    main()

"""Train a network by a config file, rewrite it mid-training, merge it at the end, and write down what it came to.

CONFIG is a TOML file; tools/configs holds those of tools/README.md, and tools/recipe/settings.py says what each setting
means. Under torchrun several processes train together. SIGINT or a kill loses what came after the last checkpoint:
--resume goes on from there, to the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
import torch
import torch.distributed as dist
from bench_common import keep, set_clock
from recipe import checkpoint
from recipe.config import Config, read_config
from recipe.data import Place
from recipe.plot import plot_runs
from recipe.record import Record, record_of
from recipe.trainer import Run


@click.command(help=__doc__)
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a setting: training.epochs=3.")
@click.option("--resume", is_flag=True, help="Go on from output.checkpoint.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what the run came to.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw accuracy against time (matplotlib).")
@click.option("--cpu-time", is_flag=True, help="Count the time of one thread's computation: for a loaded machine.")
@click.option("--threads", default=0, help="Threads of each process; 0 for torch's own choice.")
def main(
    config_file: Path,
    overrides: tuple[str, ...],
    resume: bool,
    json_file: Path | None,
    plot_file: Path | None,
    cpu_time: bool,
    threads: int,
) -> None:
    """Train, and write what came of it."""
    config = read_config(config_file, overrides)
    clock = set_clock(cpu_time, threads or torch.get_num_threads())
    with processes() as (place, device):
        run = Run(config, place, device, clock)
        if resume:
            checkpoint.resume(run, Path(config.output.checkpoint))
        run.train(click.echo if place.first else lambda line: None)
        record = record_of(run)
    if place.first:
        click.echo(summary(config, record))
        keep(json_file, [asdict(record)], clock="CPU time" if cpu_time else "wall clock", seeds=[config.seed])
        if plot_file is not None:
            plot_runs({config.name: [record]}, plot_file)


@contextmanager
def processes() -> Iterator[tuple[Place, torch.device]]:
    """Join the processes that torchrun has started, if it has, each with a device of its own where there are some."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" not in os.environ:
        yield Place(), device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


def summary(config: Config, record: Record) -> str:
    """Return what a run came to, in a few lines."""
    spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in record.seconds.items() if seconds > 0)
    lines = [f"{config.name}: accuracy {record.accuracy:.2f} %, loss {record.loss:.4f}", f"seconds: {spent}"]
    lines += record.events
    if record.factorized:
        lines.append(f"{len(record.factorized)} of {record.sites} sites factorized, {record.parameters} parameters -> "
                     f"{record.parameters_after}; merged: outputs differ by {record.merge_error:.1e}")  # fmt: skip
    if record.verified is not None:
        lines.append(
            "ONNX: the merged graph is the original's" if record.verified else "ONNX: the merged graph DIFFERS"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

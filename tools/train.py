"""Train a network by a config file, rewrite it mid-training, merge it at the end, and write the results.

CONFIG is a TOML file. tools/configs holds those of tools/README.md, and tools/recipe/settings.py says what each
setting means. Under torchrun several processes train together. SIGINT or a kill loses what came after the last
checkpoint; --resume continues from there, with bit-identical results. On two CPU cores a run takes one or two minutes
with the digits, and about five with text or glyphs; the configs named cifar10 and imagenet are for GPUs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import options
import torch
from bench_common import clock_name, set_clock, write_results
from recipe import checkpoint
from recipe.config import RunConfig, read_config
from recipe.plot import plot_runs
from recipe.processes import join_processes
from recipe.record import RunRecord, record_of
from recipe.trainer import TrainingRun


@options.command(__doc__)
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@options.overrides
@click.option("--resume", is_flag=True, help="Continue from output.checkpoint.")
@options.json_file("Write the results to a file.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Plot accuracy against time (matplotlib).")
@options.cpu_time
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
    """Train, and write the results."""
    config = read_config(config_file, overrides)
    clock = set_clock(cpu_time, threads or torch.get_num_threads())
    with join_processes() as (process, device):
        run = TrainingRun(config, process, device, clock)
        if resume:
            checkpoint.resume(run, Path(config.output.checkpoint))
        run.train(click.echo if process.is_first else lambda line: None)
        record = record_of(run)
    if process.is_first:
        click.echo(summary(config, record))
        write_results(json_file, [asdict(record)], clock=clock_name(cpu_time), seeds=[config.seed])
        if plot_file is not None:
            plot_runs({config.name: [record]}, plot_file)


def summary(config: RunConfig, record: RunRecord) -> str:
    """Return the results of a run in a few lines."""
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in record.seconds.items() if value > 0)
    lines = [f"{config.name}: accuracy {record.accuracy:.2f} %, loss {record.loss:.4f}", f"seconds: {seconds}"]
    lines += record.events
    if record.factorized:
        lines.append(
            f"{len(record.factorized)} of {record.sites} sites factorized, {record.parameters} parameters -> "
            f"{record.parameters_after}; merged: outputs differ by {record.merge_error:.1e}"
        )
    if record.verified is not None:
        verdict = "is the original's" if record.verified else "DIFFERS"
        lines.append(f"ONNX: the merged graph {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Command-line options that several programs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Option = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What ``click.option`` returns: a decorator of a command."""

cpu_time: Option = click.option(
    "--cpu-time",
    is_flag=True,
    help="Measure the CPU time of one thread instead of the wall clock: for a loaded machine.",
)
device: Option = click.option("--device", default="cpu", show_default=True, help="Where the networks run.")
batch: Option = click.option(
    "--batch", type=click.IntRange(min=1), help="Images in a batch; by default what suits each network."
)
quick: Option = click.option(
    "--quick",
    is_flag=True,
    help="One seed and a tenth of the steps: shows that the program runs, not what it measures.",
)
tasks: Option = click.option(
    "--task", "task_parts", multiple=True, metavar="TEXT", help="Only tasks whose name contains this."
)
overrides: Option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a setting, as in training.epochs=3."
)


def seeds(default: int = 3) -> Option:
    """Return the option for the number of seeds."""
    return click.option(
        "--seeds", type=click.IntRange(min=1), default=default, show_default=True, help="Number of seeds, from 0."
    )


def threads(default: int) -> Option:
    """Return the option for the number of threads."""
    return click.option("--threads", default=default, show_default=True, help="Threads that torch uses.")


def rounds(default: int, what: str) -> Option:
    """Return the option for how often each thing is timed."""
    return click.option("--rounds", default=default, show_default=True, help=f"Undisturbed {what}.")


def measure_seconds(default: float, what: str) -> Option:
    """Return the option that limits how long layers are timed."""
    return click.option(
        "--measure-seconds", default=default, show_default=True, help=f"Most seconds of measuring layers for {what}."
    )


def share(default: float) -> Option:
    """Return the option for uniform ranks."""
    return click.option("--share", default=default, show_default=True, help="Ranks, as a share of the full ranks.")


def json_file(text: str) -> Option:
    """Return the option that names the file for the figures, with its help text."""
    file = click.Path(dir_okay=False, path_type=Path)
    return click.option("--json", "json_file", type=file, help=text)


def models(default: str) -> Option:
    """Return the option for the networks, of tools/nets.py or torchvision."""
    return click.option(
        "--models", default=default, show_default=True, help="Networks of tools/nets.py or torchvision."
    )


def nets(default: str | None, note: str = "") -> Option:
    """Return the option for the networks that are trained, of tools/nets.py or torchvision."""
    text = f"Networks of tools/nets.py or torchvision{note}."
    return click.option("--nets", default=default, show_default=default is not None, help=text)

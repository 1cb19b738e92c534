"""Command-line options that several programs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

Option = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What ``click.option`` returns: a decorator of a command."""
Command = Callable[[Callable[..., Any]], click.Command]
"""What ``click.command`` returns."""

cpu_time: Option = click.option(
    "--cpu-time", is_flag=True, help="Measure the CPU time of one thread, not the wall clock: for a loaded machine."
)
device: Option = click.option("--device", default="cpu", help="Where the networks run.")
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


def command(text: str | None) -> Command:
    """Return the decorator that makes a command with a help text, whose options show their defaults."""
    return click.command(help=text, context_settings={"show_default": True})


def seeds(default: int = 3) -> Option:
    """Return the option for the number of seeds."""
    return click.option("--seeds", type=click.IntRange(min=1), default=default, help="Number of seeds, from 0.")


def threads(default: int) -> Option:
    """Return the option for the number of threads."""
    return click.option("--threads", default=default, help="Threads that torch uses.")


def rounds(default: int, what: str) -> Option:
    """Return the option for how often each thing is timed."""
    return click.option("--rounds", default=default, help=f"Undisturbed {what}.")


def measure_seconds(default: float, what: str) -> Option:
    """Return the option that limits how long layers are timed."""
    return click.option("--measure-seconds", default=default, help=f"Most seconds of measuring layers for {what}.")


def share(default: float) -> Option:
    """Return the option for uniform ranks."""
    return click.option("--share", default=default, help="Ranks, as a share of the full ranks.")


def json_file(text: str) -> Option:
    """Return the option that names the file for the figures, with its help text."""
    return click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help=text)


def networks(option: str, default: str | None, note: str = "") -> Option:
    """Return the option, ``--models`` or ``--nets``, for networks of tools/nets.py or torchvision."""
    return click.option(option, default=default, help=f"Networks of tools/nets.py or torchvision{note}.")


def is_chosen(name: str, parts: Sequence[str]) -> bool:
    """Return True if a name contains one of the parts, or if there are no parts."""
    return not parts or any(part in name for part in parts)

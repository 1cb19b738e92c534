"""Accuracy against time, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipe.errors import RecipeError
from recipe.record import Record


def plot_runs(runs: Mapping[str, Sequence[Record]], file: Path, title: str = "") -> None:
    """Draw held-out accuracy against the seconds of training, a line for each run and a color for each name.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError(
            "--plot draws with matplotlib, which is not installed. Install it with: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for color, (name, own) in enumerate(runs.items()):
        for index, one in enumerate(own):
            times = [row["seconds"] for row in one.epochs]
            axes.plot(
                times, [row["accuracy"] for row in one.epochs], color=f"C{color}", label=name if index == 0 else ""
            )
    axes.set_xlabel("training time, s")
    axes.set_ylabel("accuracy on what is held out, %")
    axes.set_title(title)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)

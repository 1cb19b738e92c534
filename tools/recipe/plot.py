"""Plots of accuracy against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipe.errors import RecipeError
from recipe.record import RunRecord


def plot_runs(runs: Mapping[str, Sequence[RunRecord]], file: Path, title: str = "") -> None:
    """Plot held-out accuracy against the seconds of training, a line for each run and a color for each name."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError(
            "--plot draws with matplotlib, which is not installed. Install it with: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for color, (name, records) in enumerate(runs.items()):
        for index, record in enumerate(records):
            points = zip(*((epoch["seconds"], epoch["accuracy"]) for epoch in record.epochs), strict=True)
            axes.plot(*points, color=f"C{color}", label=name if index == 0 else "")
    axes.set(xlabel="training time, s", ylabel="accuracy on held-out data, %", title=title)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)

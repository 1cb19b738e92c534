"""A run's figures, as plots of accuracy against time and in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.errors import RecipeError

if TYPE_CHECKING:  # recipe.record imports this by way of the trainer
    from recipe.record import RunRecord


def plot_runs(runs: Mapping[str, Sequence[RunRecord]], file: Path, title: str = "") -> None:
    """Plot held-out accuracy against the seconds of training, a line for each run and a color for each name."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError(
            "--plot draws with matplotlib, which is not installed. Install it: pip install 'tdfx[report]'"
        ) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for color, (name, records) in enumerate(runs.items()):
        for index, record in enumerate(records):
            points = [(epoch["seconds"], epoch["accuracy"]) for epoch in record.epochs if "accuracy" in epoch]
            axes.plot(
                *zip(*points, (record.total, record.accuracy), strict=True),
                color=f"C{color}",
                label=name if index == 0 else "",
            )
    axes.set(xlabel="training time, s", ylabel="accuracy on held-out data, %", title=title)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


class Board:
    """Writes the figures of each epoch to TensorBoard; does nothing if the folder is ""."""

    def __init__(self, folder: str) -> None:
        """Open the folder; RecipeError if TensorBoard is not installed."""
        self._writer: Any = None
        if folder:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RecipeError(
                    f"output.tensorboard={folder!r} asks for TensorBoard, which is not installed. Install it with "
                    f"pip install tensorboard, or set output.tensorboard=''."
                ) from error
            self._writer = SummaryWriter(folder)

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write each figure under its name."""
        if self._writer is not None:
            for name, value in values.items():
                if name != "epoch":
                    self._writer.add_scalar(f"run/{name}", value, epoch)

    def close(self) -> None:
        """Flush and close the files."""
        if self._writer is not None:
            self._writer.close()

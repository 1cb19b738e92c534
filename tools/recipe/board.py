"""A run's figures in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipe.errors import RecipeError


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

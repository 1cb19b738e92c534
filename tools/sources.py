"""Text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

_MOST_BYTES = 4_000_000
"""Most bytes of source that are read for each part."""


def python_sources() -> tuple[Tensor, Tensor]:
    """Return bytes (n,) to train on, and bytes of every twentieth file to hold out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    training_files = [file for index, file in enumerate(files) if index % 20]
    train, held_out = (_read_bytes(part) for part in (training_files, files[::20]))
    return train, held_out


def _read_bytes(files: list[Path]) -> Tensor:
    content = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(content[:_MOST_BYTES]), dtype=torch.uint8).long()


def pieces(text: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pieces (count, length) of a text from random positions, and for each byte the one after it."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    windows = text[starts + torch.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]

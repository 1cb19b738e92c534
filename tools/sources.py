"""Text that every machine has: the sources of Python's own standard library, byte by byte."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

_MOST_BYTES = 4_000_000
"""Bytes of source that are read."""


def python_sources() -> tuple[Tensor, Tensor]:
    """Return bytes (n,) to train on, and those of every twentieth file to hold out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    train = [one for place, one in enumerate(files) if place % 20]
    parts = [b"".join(one.read_bytes() for one in own) for own in (train, files[::20])]
    first, second = (torch.frombuffer(bytearray(one[:_MOST_BYTES]), dtype=torch.uint8).long() for one in parts)
    return first, second


def pieces(text: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pieces (count, length) of a text that begin anywhere, and the byte after each of theirs."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    found = text[starts + torch.arange(length + 1)]
    return found[:, :-1], found[:, 1:]

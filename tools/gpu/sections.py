"""The sections in the order in which they run, with their deadlines."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from gpu.rows import Bench, Cases


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the benchmark that runs in a process of its own."""

    module: str
    """The module of tools/gpu with its cases, imported only in that process."""
    cases: str = "CASES"
    small: str = "SMALL"
    seconds: int = 60
    """Its deadline in full size."""

    def rows(self, bench: Bench) -> Cases:
        """Return the cases for a device and a size."""
        module = importlib.import_module(f"gpu.{self.module}")
        cases: Cases = getattr(module, self.small if bench.small else self.cases)
        if self.module == "correctness" and bench.is_cuda:
            cases = {**cases, **module.ON_CUDA}
        if self.module == "correctness" and not bench.small:
            cases = {**cases, **importlib.import_module("gpu.processes").CASES}
        return cases


SECTIONS = {
    "ceilings": Section("ceilings", small="CASES", seconds=30),
    "correctness": Section("correctness", seconds=90),
    "timing": Section("timing", seconds=60),
    "steps": Section("steps", seconds=180),
    "pass": Section("passes", "PASS", "SMALL_PASS", seconds=50),
    "memory": Section("passes", "MEMORY", "SMALL_MEMORY", seconds=20),
    "accuracy": Section("accuracy", seconds=50),
}
"""Together eight minutes at most; what is faster leaves its time unused."""

"""The rows of the benchmark: what was measured, what it must keep to, and whether it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

Status = Literal["ok", "falsified", "FAILED", "not run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and how much is measured."""

    device: str
    small: bool
    """Sizes that a CPU computes in seconds; they show that the program runs, not what a GPU does."""

    @property
    def is_cuda(self) -> bool:
        """True on CUDA, where there are events, graphs and clocks."""
        return torch.device(self.device).type == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the results."""

    section: str
    name: str
    status: Status = "ok"
    values: Mapping[str, Any] = field(default_factory=dict)
    bound: str = ""
    """What would falsify it."""
    clocks: Mapping[str, Any] = field(default_factory=dict)
    """Clock, temperature and power of the device after the row, where its driver says them."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


Measure = Callable[[Bench], "Outcome"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a measurement found."""

    values: Mapping[str, Any]
    holds: bool = True
    bound: str = ""


Cases = Mapping[str, Measure]
"""Name of a row -> what measures it."""


def run_cases(section: str, cases: Cases, bench: Bench) -> Iterator[Row]:
    """Measure one case after the other; a case that raises is a row FAILED, and the others go on."""
    for name, measure in cases.items():
        try:
            outcome = measure(bench)
            status: Status = "ok" if outcome.holds else "falsified"
            row = Row(section=section, name=name, status=status, values=outcome.values, bound=outcome.bound)
        except Exception as error:  # whatever fails is a result of the benchmark
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            row = Row(section=section, name=name, status="FAILED", values={"error": text})
        yield Row(**{**row.to_dict(), "clocks": clocks(bench)})


def clocks(bench: Bench) -> dict[str, Any]:
    """Return what the driver says of the device; nothing without a driver or the package pynvml."""
    if not bench.is_cuda:
        return {}
    readings: dict[str, Callable[[], Any]] = {
        "MHz": torch.cuda.clock_rate,
        "C": torch.cuda.temperature,
        "mW": torch.cuda.power_draw,
    }
    known = {}
    for name, read in readings.items():
        try:
            known[name] = read()
        except Exception:  # pynvml is missing, or the driver does not tell
            continue
    return known

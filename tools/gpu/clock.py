"""Times on a device: by events on CUDA and by the wall clock elsewhere, in the order A B B A."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu.rows import Bench
from tdfx.devices import synchronize

Run = Callable[[], object]


def seconds_of(run: Run, bench: Bench, repeat: int = 1) -> float:
    """Return the seconds of one call on the device: the mean of some that are enqueued together."""
    synchronize(bench.device)
    if not bench.is_cuda:
        began = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - began) / repeat
    cuda: Any = torch.cuda
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeat


def host_seconds(run: Run, bench: Bench, repeat: int = 20) -> float:
    """Return the seconds that the CPU takes to enqueue one call."""
    synchronize(bench.device)
    began = time.perf_counter()
    for _ in range(repeat):
        run()
    took = (time.perf_counter() - began) / repeat
    synchronize(bench.device)
    return took


def interleaved(runs: Sequence[Run], bench: Bench, *, rounds: int = 3, repeat: int = 1) -> list[float]:
    """Return the median seconds of each function, called in turns forwards and backwards (A B B A)."""
    for run in runs:
        run()
        run()
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for index in (*range(len(runs)), *reversed(range(len(runs)))):
            samples[index].append(seconds_of(runs[index], bench, repeat))
    return list(map(statistics.median, samples))


def as_graph(run: Run, bench: Bench) -> Run:
    """Return the replay of a CUDA graph of a function; the function itself where there are no graphs."""
    if not bench.is_cuda:
        return run
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay

"""Section timing: the gains that tdfx measures for single layers, beside those of graph replays with cold caches."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

import tdfx
from gpu.clock import as_graph, interleaved
from gpu.rows import Bench, Cases, Outcome
from tdfx.cost.count import Flow
from tdfx.cost.setting import Setting
from tdfx.cost.workload import Workload
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme

_BATCH, _SMALL_BATCH = 128, 2


def _conv(channels: int, kernel: int = 3) -> Operation:
    pad = kernel // 2
    return replace(Operation.pointwise(channels, channels, 2), kernel=(kernel, kernel), padding=(pad, pad))


SITES: dict[str, tuple[Operation, tuple[int, ...], str]] = {
    "conv3 64 at 56": (_conv(64), (56, 56), "tucker2"),
    "conv3 128 at 28": (_conv(128), (28, 28), "tucker2"),
    "conv3 256 at 14": (_conv(256), (14, 14), "tucker2"),
    "conv3 512 at 7": (_conv(512), (7, 7), "tucker2"),
    "conv3 512 at 28": (_conv(512), (28, 28), "tucker2"),
    "conv1 256 at 56": (Operation.pointwise(256, 256, 2), (56, 56), "svd"),
    "conv1 1024 at 14": (Operation.pointwise(1024, 1024, 2), (14, 14), "svd"),
    "conv1 2048 at 7": (Operation.pointwise(2048, 2048, 2), (7, 7), "svd"),
    "linear 768": (Operation(in_channels=768, out_channels=768), (), "svd"),
    "linear 768 to 3072": (Operation(in_channels=768, out_channels=3072), (), "svd"),
    "linear 2048": (Operation(in_channels=2048, out_channels=2048), (), "svd"),
    "linear 4096": (Operation(in_channels=4096, out_channels=4096), (), "svd"),
}


def _gain(name: str, bench: Bench) -> Outcome:
    """Compare three measurements of a site at a quarter of its ranks with replays of graphs."""
    operation, size, scheme_name = SITES[name]
    scheme = get_scheme(scheme_name)
    ranks = tuple(max(1, full // 4) for full in scheme.full_ranks(operation))
    chains = (operation,), tuple(scheme.chain(operation, ranks))
    samples = _SMALL_BATCH if bench.small else _BATCH
    setting = Setting(device=bench.device, autocast=torch.bfloat16, channels_last=bool(size))
    flow = Flow(samples if size else 64 * samples, tuple(min(side, 8) for side in size) if bench.small else size)
    flow = replace(flow, setting=setting)
    cost = tdfx.Measured(cache=False, update_bytes=0, rounds=1 if bench.small else 3)
    gains = []
    for _ in range(1 if bench.small else 3):
        times = [cost._time([(chain, flow) for chain in chains], 10.0)[chain, flow].seconds for chain in chains]
        gains.append(times[0] / times[1])
    works = [Workload(chain, flow) for chain in chains]
    dense, factorized = interleaved([as_graph(work.run, bench) for work in works], bench)
    truth = (dense / works[0].steps) / (factorized / works[1].steps)
    off = max(max(gain / truth, truth / gain) for gain in gains)
    return Outcome(
        {"gains": gains, "by replay": truth, "off": off}, bench.small or off <= 1.25, "off by more than 1.25x"
    )


CASES: Cases = {name: partial(_gain, name) for name in SITES}
SMALL: Cases = {name: CASES[name] for name in ("conv3 64 at 56", "linear 768")}

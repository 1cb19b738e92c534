"""Section steps: whole training steps with the default policy, eager, as CUDA graphs and compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_common import separate_times
from torch import nn

import tdfx
from gpu.clock import Run, as_graph, interleaved
from gpu.networks import Step, build_network
from gpu.rows import Bench, Cases, Outcome

_LEAST = {"vgg19": 1.3, "vgg19_bn": 1.3}
"""Networks that must gain at least so much."""


def _eager(step: Step, bench: Bench) -> Run:
    return step


def _graph(step: Step, bench: Bench) -> Run:
    for group in step.optimizer.param_groups:
        group["capturable"] = True
    return as_graph(step, bench)


def _compiled(step: Step, bench: Bench) -> Run:
    step.model = torch.compile(step.model)  # type: ignore[assignment]
    return step


MODES: dict[str, Callable[[Step, Bench], Run]] = {"eager": _eager, "graphs": _graph, "compiled": _compiled}


def _step(name: str, mode: str, bench: Bench) -> Outcome:
    """Compare dense and tdfx in turns, and the predicted gain with the measured one."""
    network = build_network(name, bench)
    dense: nn.Module = copy.deepcopy(network.model)
    cost = tdfx.Measured(budget=1.0 if bench.small else 15.0, rounds=1 if bench.small else 3)
    with separate_times(), network.autocast():
        plan = tdfx.plan(network.model, tdfx.Policy(cost=cost), example_inputs=network.inputs)
        small = tdfx.rewrite(network.model, plan)
    runs = [MODES[mode](Step(network, model), bench) for model in (dense, small)]
    before, after = interleaved(runs, bench, rounds=1 if bench.small else 5)
    gain, predicted = before / after, plan.speedup
    values: dict[str, Any] = {"dense s": before, "tdfx s": after, "gain": gain, "predicted": predicted}
    values |= {"sites": f"{len(plan.factorized)}/{len(plan.sites)}"}
    least = max(0.98, _LEAST.get(name, 0.0))
    is_near = predicted is None or abs(predicted / gain - 1) <= 0.1
    bound = f"below {least:g}x, or predicted off by more than 10 %"
    return Outcome(values, bench.small or (gain >= least and is_near), bound)


NAMES = (
    "resnet50",
    "vgg19_bn",
    "vgg19",
    "resnet18",
    "resnet18 b8",
    "vit_b_16",
    "gpt2-small",
    "blocks 1024",
    "blocks 2048",
)
CASES: Cases = {f"{name}, {mode}": partial(_step, name, mode) for name in NAMES for mode in MODES}
SMALL: Cases = {"tiny, eager": partial(_step, "tiny", "eager")}

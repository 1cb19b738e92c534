"""Sections pass and memory: the time and the memory of planning, rewriting and merging."""

from __future__ import annotations

import time
from functools import partial

import torch
from bench_common import separate_times
from bench_memory import LiveBytes, kept_tensors, measure_call, step
from torch.optim import AdamW

import tdfx
from gpu.clock import interleaved
from gpu.networks import build_network
from gpu.rows import Bench, Cases, Outcome
from tdfx.devices import synchronize


def _seconds(bench: Bench, began: float) -> float:
    synchronize(bench.device)
    return time.perf_counter() - began


def _pass(name: str, bench: Bench) -> Outcome:
    """Time a plan that measures, one that only reads the weights, a rewrite and a merge."""
    network = build_network(name, bench)
    values = {}
    with separate_times(), network.autocast():
        for label, policy in (("measuring", tdfx.Policy()), ("reading", tdfx.Policy(cost=tdfx.Modelled()))):
            began = time.perf_counter()
            plan = tdfx.plan(network.model, policy, example_inputs=network.inputs)
            values[f"plan, {label}"] = _seconds(bench, began)
        plan = tdfx.plan(
            network.model, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0), example_inputs=network.inputs
        )
        began = time.perf_counter()
        small = tdfx.rewrite(network.model, plan)
        values["rewrite"] = _seconds(bench, began)
        began = time.perf_counter()
        tdfx.merge(small)
        values["merge"] = _seconds(bench, began)
    return Outcome(values, bench.small or sum(values.values()) < 60, "a minute in all")


def _eigen(side: int, bench: Bench) -> Outcome:
    """Time an eigendecomposition on the device and on the CPU; ``ranks/spectrum.py`` takes the CPU up to 256."""
    x = torch.randn(side, side, dtype=torch.float64, device=bench.device)
    gram = x @ x.mT
    on_cpu = gram.cpu()
    there, here = interleaved([lambda: torch.linalg.eigh(gram), lambda: torch.linalg.eigh(on_cpu)], bench, rounds=1)
    return Outcome({"on the device": there, "on the CPU": here})


PASS: Cases = {
    "resnet50": partial(_pass, "resnet50"),
    "vit_b_16": partial(_pass, "vit_b_16"),
    **{f"eigh {side}": partial(_eigen, side) for side in (64, 256, 512, 1024, 2048)},
}
SMALL_PASS: Cases = {"tiny": partial(_pass, "tiny"), "eigh 64": partial(_eigen, 64)}


def _memory(name: str, bench: Bench) -> Outcome:
    """Compare the peaks of plan, rewrite and merge with that of a dense step; bytes of live tensors, on any device."""
    network = build_network(name, bench)
    model, (x,) = network.model, network.inputs
    optimizer = AdamW(model.parameters(), foreach=False)
    for _ in range(2):
        step(model, optimizer, x)
    values: dict[str, float] = {}
    with separate_times(), LiveBytes([*kept_tensors(model, optimizer), x]) as live:
        dense, _ = measure_call(live, lambda: step(model, optimizer, x))
        plan_reading, plan = measure_call(live, lambda: tdfx.plan(model, tdfx.Policy(), example_inputs=(x,)))
        rewrite, small = measure_call(live, lambda: tdfx.rewrite(model, plan, optimizer=optimizer))
        merge, _ = measure_call(live, lambda: tdfx.merge(small, optimizer=optimizer))
    readings = (("plan", plan_reading), ("rewrite", rewrite), ("merge", merge))
    values = {what: reading.peak / dense.peak - 1 for what, reading in readings}
    holds = bench.small or max(values.values()) <= 0.05
    return Outcome({"step in bytes": dense.peak, "above a step": values}, holds, "more than 5 % above a dense step")


MEMORY: Cases = {name: partial(_memory, name) for name in ("vgg19", "resnet50")}
SMALL_MEMORY: Cases = {"tiny": partial(_memory, "tiny")}

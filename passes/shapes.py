"""What flows through each site, from one forward pass with example inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tdfx.cost.count import Flow
from tdfx.errors import InputError
from tdfx.factors.operation import Operation
from tdfx.passes.base import Change, Pass, PassResult, Program, Site
from tdfx.passes.tracer import throwaway
from tdfx.plan import Reason

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Example inputs: the positional arguments of the model, one tensor for a single one, or keyword arguments by name."""


class Shapes(Pass):
    """Run the model once in eval mode, without gradients, and note the shape of what enters each site."""

    name = "shapes"

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def run(self, program: Program) -> PassResult:
        """Attach the flows to the sites and their shapes to the graphs' nodes."""
        seen = _observe(program, self.inputs)
        in_graph = {id(site.layer) for site in program.sites if site.nodes}
        sites = tuple(_with_flows(site, seen.get(site.name, []), id(site.layer) in in_graph) for site in program.sites)
        for site in sites:
            for node in site.nodes:
                node.meta["tdfx_flows"] = site.flows
        changes = tuple(Change(site.name, "shape known") for site in sites if site.flows)
        return PassResult(replace(program, sites=sites), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """No site is lost and each site that was run has a flow for each of its calls."""
        self.check(
            [site.name for site in before.sites] == [site.name for site in result.program.sites],
            "the sites are those that were found",
        )


def _observe(program: Program, inputs: Inputs) -> dict[str, list[Flow]]:
    """Return what entered each site in one forward pass of a copy."""
    seen: defaultdict[str, list[Flow]] = defaultdict(list)
    copy = throwaway(program.module, mode=False)
    for site in program.sites:
        if site.operation is not None:
            copy.get_submodule(site.name).register_forward_pre_hook(
                _recorder(seen[site.name], site.operation), with_kwargs=True
            )
    arguments, named = tree_map_only(Tensor, Tensor.clone, _arguments(inputs))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(copy)):
            copy(*arguments, **named)
    except Exception as error:  # whatever the model raises, it is about these inputs
        raise InputError(
            f"{type(program.module).__name__} does not accept the example inputs {_describe(inputs)}: "
            f"{type(error).__name__}: {error}. Pass example_inputs=(x,) with the shape, dtype and device that its forward "
            f"takes, or leave them out to plan without shapes."
        ) from error
    return dict(seen)


def _recorder(flows: list[Flow], operation: Operation) -> Any:
    def record(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        entering = arguments[0] if arguments else named.get("input")
        if isinstance(entering, Tensor):
            flows.append(flow_of(tuple(entering.shape), operation))

    return record


def flow_of(shape: tuple[int, ...], operation: Operation) -> Flow:
    """Return what a tensor of this shape brings to an operation.

    >>> flow_of((8, 3, 32, 32), Operation.pointwise(3, 4, 2))
    Flow(samples=8, size=(32, 32))
    >>> flow_of((8, 50, 128), Operation(in_channels=128, out_channels=4))
    Flow(samples=400, size=())
    """
    if operation.dims == 0:
        return Flow(math.prod(shape[:-1]))
    return Flow(math.prod(shape[: -operation.dims - 1]), shape[len(shape) - operation.dims :])


def _with_flows(site: Site, flows: list[Flow], in_graph: bool) -> Site:
    if flows or in_graph or site.reason is not None:
        return replace(site, flows=tuple(flows), calls=max(site.calls, len(flows)) if in_graph else len(flows))
    return replace(site, flows=(), calls=0, reason=Reason.NOT_CALLED, note="the example inputs do not reach it")


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def _describe(inputs: Inputs) -> str:
    arguments, named = _arguments(inputs)
    parts = [_describe_one(one) for one in arguments] + [f"{key}={_describe_one(one)}" for key, one in named.items()]
    return f"({', '.join(parts)})"


def _describe_one(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__


def _cuda_devices(module: nn.Module) -> list[torch.device]:
    return list({parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"})

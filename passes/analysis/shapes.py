"""What flows through each site, from forward passes with example inputs; and the sites that only a run shows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat

from torch import Tensor, nn

from tdfx.cost.count import Flow
from tdfx.distributed.processes import Agree, Ready, Together, itself, unasked
from tdfx.errors import InputError, TdfxError
from tdfx.factors.operation import Operation
from tdfx.kinds.registry import is_candidate, kind_of
from tdfx.layers.factorized import Factorized
from tdfx.passes.analysis.blockers import layers_inside_leaves, obstacle
from tdfx.passes.analysis.observe import Entered, Inputs, Observed, is_channels_last, observe, split_inputs
from tdfx.passes.analysis.uses import Uses, uses_of
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import ParameterSlot, Program, Site
from tdfx.plans.plan import Reason


class ObserveInputs(Pass):
    """Run the model in eval mode, without gradients, and note the shape of what enters each site.

    A second run, in train mode, is made where it is needed: for sites that the first did not reach, as auxiliary heads; and
    for a parameter that was passed to a function, in code that no graph shows, which becomes a site if that run shows no
    other use of it.
    """

    name = "shapes"

    def __init__(
        self, inputs: Inputs, together: Together = nullcontext, ready: Ready = unasked, agree: Agree = itself
    ) -> None:
        self.inputs = inputs
        self.together = together
        self.ready = ready
        self.agree = agree
        self._in_training: Observed | str | None = None

    def run(self, program: Program) -> PassResult:
        """Attach the flows to the sites."""
        self._in_training = None
        try:
            seen = observe(program.module, self.inputs, training=False, shards=program.shards, ready=self.ready)
        except TdfxError:  # another process has failed
            raise
        except Exception as error:  # whatever the model raises, it is about these inputs
            raise InputError(
                f"{type(program.module).__name__} does not accept the example inputs {_describe(self.inputs)}: "
                f"{type(error).__name__}: {error}. Pass example_inputs=(x,) (--input on the command line) with the shape, "
                f"dtype and device that its forward takes, or leave them out to plan without shapes."
            ) from error
        uses = uses_of(program)
        sites = self._with_functional(program, seen, uses)
        sites = self._agreed(self._reached_in_either_mode(program, sites, seen, uses))
        changes = tuple(Change(site.name, "shape known") for site in sites if site.flows)
        return PassResult(replace(program, sites=tuple(sites)), changes)

    def _with_functional(self, program: Program, seen: Observed, uses: Uses) -> list[Site]:
        """Return the sites with those that only the run showed to be functional calls."""
        inside = layers_inside_leaves(program.module)
        slots = [
            slot
            for slot in _slots(program.module)
            if id(_parameter(program.module, slot)) in seen.functional
            and id(_parameter(program.module, slot)) not in uses.functional
            and id(program.module.get_submodule(slot.owner)) not in inside
        ]
        if not slots:
            return list(program.sites)
        run = self._in_train_mode(program)
        if isinstance(run, Observed):
            reads, unknown = seen.reads | run.reads, ""
        else:
            reads = seen.reads
            unknown = f"in train mode the model does not run on the example inputs: {run}"
        made = {site.name: site for slot in slots for site in _site(program.module, slot, seen, uses, reads, unknown)}
        sites = [made.pop(site.name, site) for site in program.sites]
        return _in_order(program.module, [*sites, *made.values()])

    def _reached_in_either_mode(
        self, program: Program, sites: Sequence[Site], seen: Observed, uses: Uses
    ) -> list[Site]:
        """Attach to each site what flows into it in eval mode; where that is nothing, what does so in train mode."""
        in_graph = [id(site.layer) in uses.traced and bool(site.nodes) for site in sites]
        found = list(map(_with_flows, sites, repeat(seen), in_graph))
        missed = [
            index
            for index, (site, one) in enumerate(zip(sites, found, strict=True))
            if site.is_open and one.is_missed and (one.is_open or one.reason is Reason.NOT_CALLED)
        ]
        run = self._in_train_mode(program) if missed else None
        if isinstance(run, Observed):
            for index in missed:
                found[index] = _with_flows(sites[index], run, in_graph[index])
        return found

    def _agreed(self, sites: Sequence[Site]) -> list[Site]:
        """Return what all processes decide by: it must be the same, whatever batch each of them has."""
        mine = [(site.flows, site.calls, site.reason, site.note) for site in sites]
        return [
            replace(site, flows=flows, calls=calls, reason=reason, note=note)
            for site, (flows, calls, reason, note) in zip(sites, self.agree(mine), strict=True)
        ]

    def _in_train_mode(self, program: Program) -> Observed | str:
        """Return what a run in train mode did, or the error of one that failed.

        A model may want targets then, or larger batches.
        """
        if self._in_training is None:
            try:
                # In shards all run the same; whole models may take other ways, each on inputs of its own.
                with self.together() if program.shards else nullcontext():
                    self._in_training = observe(
                        program.module, self.inputs, training=True, shards=program.shards, ready=self.ready
                    )
            except Exception as error:  # whatever the model raises
                # Not the error itself, which holds on to all that the run had made.
                self._in_training = type(error).__name__
        return self._in_training

    def ensures(self, before: Program, result: PassResult) -> None:
        """No site is lost, none is listed twice, and those that were found stay in their order."""
        found = [site.name for site in before.sites]
        now = [site.name for site in result.program.sites]
        self.check([name for name in now if name in set(found)] == found, "the sites that were found are still there")
        self.check(len(now) == len(set(now)), "every site is listed once")


def _site(
    root: nn.Module, slot: ParameterSlot, seen: Observed, uses: Uses, reads: Collection[int], unknown: str
) -> Iterator[Site]:
    owner = root.get_submodule(slot.owner)
    parameter = owner._parameters[slot.name]
    assert parameter is not None
    calls = seen.functional[id(parameter)]
    layer_kind = kind_of(owner) if is_candidate(owner) else None
    if layer_kind is not None and slot.name != layer_kind.weight:
        return
    kind = layer_kind.name if layer_kind is not None else calls[0][0].name
    operation = calls[0][0].operation(parameter.shape)
    reason, note = obstacle(parameter, kind, operation, uses.owners, reads, uses.shards)
    if reason is None and unknown:
        reason, note = Reason.READ_ELSEWHERE, unknown
    yield Site(
        name=slot.owner if layer_kind is not None else slot.path,
        layer=owner,
        kind=kind,
        operation=operation,
        calls=len(calls),
        reason=reason,
        note=note,
        slot=slot,
    )


def _slots(root: nn.Module) -> list[ParameterSlot]:
    """Return the places of all parameters, each under its first name."""
    return [ParameterSlot.of(name) for name, _ in root.named_parameters()]


def _parameter(root: nn.Module, slot: ParameterSlot) -> object:
    return root.get_submodule(slot.owner)._parameters[slot.name]


def _in_order(root: nn.Module, sites: list[Site]) -> list[Site]:
    """Sort sites as Find lists them: by the module, then by its parameters."""
    places = {path: index for index, (path, _) in enumerate(root.named_modules())}

    def place(site: Site) -> tuple[int, int]:
        if isinstance(site.layer, Factorized):
            return places[site.slot.path if site.slot is not None else site.name], 0
        if site.slot is None:
            return places[site.name], 0
        names = list(root.get_submodule(site.slot.owner)._parameters)
        return places[site.slot.owner], names.index(site.slot.name) if site.slot.name in names else 0

    return sorted(sites, key=place)


def _with_flows(site: Site, seen: Observed, in_graph: bool) -> Site:
    calls = seen.functional.get(id(site.weight), ()) if site.slot is not None else ()
    if calls:
        entered = [one for _, one in calls]
    else:  # a layer, or a parameter that is factorized already
        entered = seen.entering.get(site.slot.path if site.slot is not None else site.name, [])
    if not entered and site.reason is Reason.READ_ELSEWHERE and not site.nodes:
        return site  # what enters it is known to nobody
    flows = tuple(_flow(one, site, site.operation) for one in entered) if site.operation is not None else ()
    if calls and site.weight is not None:
        own = (call.operation(site.weight.shape) for call, _ in calls)
        flows = tuple(replace(flow, operation=one) for flow, one in zip(flows, own, strict=False))
    if site.reason is None and id(site.weight) in seen.reads:
        note = (
            "forward reads its weight besides calling it" if entered else "forward reads its weight without calling it"
        )
        return replace(site, flows=flows, calls=len(entered), reason=Reason.READ_ELSEWHERE, note=note)
    if flows or in_graph or site.reason is not None:
        return replace(site, flows=flows, calls=max(site.calls, len(entered)) if in_graph else len(entered))
    return replace(site, flows=(), calls=0, reason=Reason.NOT_CALLED, note="the example inputs do not reach it")


def _flow(entered: Entered, site: Site, operation: Operation) -> Flow:
    """Return what one call brings, computed in the dtype of the site's weight and in the layout of either operand."""
    weights = [weight for weight in site.weights if isinstance(weight, Tensor)]
    setting = replace(
        entered.setting,
        dtype=weights[0].dtype if weights else entered.setting.dtype,
        channels_last=entered.setting.channels_last or any(map(is_channels_last, weights)),
    )
    return replace(flow_of(entered.shape, operation), setting=setting)


def flow_of(shape: tuple[int, ...], operation: Operation) -> Flow:
    """Return what a tensor of this shape brings to an operation.

    >>> flow_of((8, 3, 32, 32), Operation.pointwise(3, 4, 2))
    Flow(samples=8, size=(32, 32), operation=None)
    >>> flow_of((8, 50, 128), Operation(in_channels=128, out_channels=4))
    Flow(samples=400, size=(), operation=None)
    """
    if operation.dims == 0:
        return Flow(math.prod(shape[:-1]))
    return Flow(math.prod(shape[: -operation.dims - 1]), shape[len(shape) - operation.dims :])


def _describe(inputs: Inputs) -> str:
    arguments, named = split_inputs(inputs)
    parts = [_describe_one(one) for one in arguments] + [f"{key}={_describe_one(one)}" for key, one in named.items()]
    return f"({', '.join(parts)})"


def _describe_one(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__

"""What flows through each site, from forward passes with example inputs; and the sites that only a run shows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import repeat

from torch import Tensor, fx, nn

from tdfx.cost.count import Flow
from tdfx.distributed.processes import Processes
from tdfx.errors import InputError, ModelError, TdfxError
from tdfx.factors.operation import Operation
from tdfx.kinds.products import PackedCall, common_use
from tdfx.kinds.registry import is_candidate, kind_of
from tdfx.layers.paths import parameters_by_path
from tdfx.passes.analysis.blockers import USED_TWICE, blocker_of_weight, layers_inside_leaves
from tdfx.passes.analysis.code_reader import UnsafeCodeError
from tdfx.passes.analysis.compare_effects import difference
from tdfx.passes.analysis.loop import LoopSettings
from tdfx.passes.analysis.observe import Entered, Inputs, Observed, is_channels_last, observe, split_inputs
from tdfx.passes.analysis.readers import MAY_READ
from tdfx.passes.analysis.uses import Uses, uses_of
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import ParameterSlot, Program, Site
from tdfx.plans.plan import Reason


class ObserveInputs(Pass[PassResult]):
    """Run the model in eval mode, without gradients, and record the shape of what enters each site.

    A second run, in train mode, is made where it is needed: for sites that the first run did not reach, such as auxiliary
    heads, and for a parameter that was passed to a function in code that no graph shows. Such a parameter becomes a site if
    the run in train mode shows no other use of it.

    """

    name = "observe_inputs"

    def __init__(self, inputs: Inputs, loop: LoopSettings | None = None) -> None:
        self.inputs = inputs
        self.loop = loop
        """What was seen of the training loop, which the flows are to have."""

    def run(self, program: Program) -> PassResult:
        """Attach the flows to the sites."""
        gather = program.processes if program.shards else None
        try:
            in_eval = observe(program.module, self.inputs, training=False, gather=gather)
        except TdfxError:  # another process has failed
            raise
        except UnsafeCodeError as error:
            raise ModelError(
                f"{type(program.module).__name__} cannot be run without a trace: {error}. Let forward make what "
                f"it draws from, or keep a number in its place."
            ) from error
        except Exception as error:  # whatever the model raises, it is about these inputs
            raise InputError(
                f"{type(program.module).__name__} does not accept the example inputs {_describe(self.inputs)}: "
                f"{type(error).__name__}: {error}. Pass example_inputs=(x,) (--input on the command line) with the shape, "
                f"dtype and device that its forward takes, or leave them out to plan without shapes."
            ) from error
        runs = _Runs(program, self.inputs, in_eval)
        if isinstance(runs.reads_in_train, frozenset):
            program = replace(program, sites=tuple(map(_reopened, program.sites)))
            runs.program = program
        observed = _with_flows_of_either_mode(_with_functional_sites(runs), runs)
        if self.loop is not None:
            observed = [_as_in_loop(site, self.loop) for site in observed]
        sites = _broadcast_sites(program.processes, observed)
        changes = tuple(Change(site.name, "shape known") for site in sites if site.flows)
        program = _checked_graph(program, self.inputs)
        return PassResult(replace(program, sites=tuple(sites)), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """No site is lost, none is listed twice, and the sites of before stay in their order."""
        names_before, names = ([site.name for site in program.sites] for program in (before, result.program))
        self.check([name for name in names if name in set(names_before)] == names_before, "no site is lost or moved")
        self.check(len(names) == len(set(names)), "every site is listed once")


def _checked_graph(program: Program, inputs: Inputs) -> Program:
    """Run the graph of the model beside its module; unless both do the same, the model is to keep its class."""
    if program.emit != "graph" or "" not in program.graphs or isinstance(program.module, fx.GraphModule):
        return program
    why = program.processes.broadcast_object(difference(program.module, program.graphs[""], inputs))
    if not why:
        return program
    note = f"given back as {type(program.module).__name__}, not as a graph: {why}"
    notes = (*(each for each in program.notes if not each.startswith("the graph calls")), note)
    return replace(program, emit="modules", notes=notes)


class _Runs:
    """The runs of a program on example inputs: in eval mode, and in train mode on first use."""

    def __init__(self, program: Program, inputs: Inputs, in_eval: Observed) -> None:
        self.program = program
        self.inputs = inputs
        self.in_eval = in_eval
        self.uses = uses_of(program)

    @cached_property
    def in_train(self) -> Observed | str:
        """What a run in train mode did, or the name of the error if it failed: a model may need targets then."""
        gather = self.program.processes if self.program.shards else None
        try:
            # Processes with shards run in step; without shards each runs by itself, on inputs of its own.
            with gather.raise_on_all() if gather is not None else nullcontext():
                return observe(self.program.module, self.inputs, training=True, gather=gather)
        except Exception as error:  # whatever the model raises
            return type(error).__name__  # the error itself would keep all tensors of the run alive

    @cached_property
    def reads_in_train(self) -> frozenset[int] | None:
        """The parameters that train mode reads besides, where no graph shows them all; None if that is not known."""
        root = self.program.graphs.get("")
        if root is not None and not root.mismatch and not root.opaque:
            return frozenset()
        return frozenset(self.in_train.reads) if isinstance(self.in_train, Observed) else None


def _reopened(site: Site) -> Site:
    """Open a site of which a run with example inputs tells what its source did not."""
    return replace(site, reason=None, note="") if site.note.endswith(MAY_READ) else site


def _with_functional_sites(runs: _Runs) -> list[Site]:
    module, uses, in_eval = runs.program.module, runs.uses, runs.in_eval
    runs.program = replace(runs.program, sites=tuple(_as_called(site, in_eval) for site in runs.program.sites))
    inside = layers_inside_leaves(module)
    new = in_eval.functional.keys() - uses.functional.keys()
    slots = [ParameterSlot.of(path) for path, parameter in parameters_by_path(module) if id(parameter) in new]
    slots = [slot for slot in slots if id(module.get_submodule(slot.owner)) not in inside]
    unsupported = list(_unsupported_products(runs, inside))
    # All processes run the model in train mode, or none: its layers may communicate. The first one's sites count.
    if not runs.program.processes.broadcast_object(bool(slots)):
        return _in_order(module, [*runs.program.sites, *unsupported]) if unsupported else list(runs.program.sites)
    reads, doubt = in_eval.reads, ""
    if isinstance(runs.in_train, Observed):
        reads = reads | runs.in_train.reads
    else:
        doubt = f"in train mode the model does not run on the example inputs: {runs.in_train}"
    observed = filter(None, (_functional_site(module, slot, in_eval, uses, reads, doubt) for slot in slots))
    by_name = {site.name: site for site in observed}
    sites = [by_name.pop(site.name, site) for site in runs.program.sites]
    return _in_order(module, [*sites, *by_name.values(), *unsupported])


def _as_called(site: Site, observed: Observed) -> Site:
    """Return a site with what its calls compute, where a graph or the class of its module leaves that open."""
    weight = site.weight
    is_open = site.slot is not None and (not site.nodes or site.layout is not None)
    calls = observed.functional.get(id(weight), []) if is_open else []
    if weight is None or not calls:
        return site
    operation, layout = common_use([call for call, _ in calls], weight.shape) or (site.operation, site.layout)
    packed = next((call.name for call, _ in calls if isinstance(call, PackedCall)), "")
    kind = layout.name if layout is not None else packed or site.kind
    return replace(site, operation=operation, layout=layout, kind=kind)


def _unsupported_products(runs: _Runs, inside: Collection[int]) -> Iterator[Site]:
    """Yield the parameters that code multiplies with in a way that factors cannot stand for, each with that reason."""
    module, multiplied = runs.program.module, runs.in_eval.multiplied
    listed = {id(site.weight) for site in runs.program.sites} | runs.in_eval.functional.keys()
    for path, parameter in parameters_by_path(module):
        slot = ParameterSlot.of(path)
        owner = module.get_submodule(slot.owner)
        if id(parameter) not in multiplied or id(parameter) in listed or parameter.dim() < 2 or id(owner) in inside:
            continue
        if not is_candidate(owner):
            name = multiplied[id(parameter)]
            site = Site(name=path, layer=owner, kind=name, operation=None, calls=1, slot=slot)
            note = f"its product by {name} is no linear map for each slice of it"
            yield replace(site, reason=Reason.READ_ELSEWHERE, note=note)


def _functional_site(
    root: nn.Module, slot: ParameterSlot, observed: Observed, uses: Uses, reads: Collection[int], doubt: str
) -> Site | None:
    """Return the site of a parameter that functions take as their weight; None if a layer kind has another weight there."""
    owner = root.get_submodule(slot.owner)
    parameter = owner._parameters[slot.name]
    assert parameter is not None
    calls = observed.functional[id(parameter)]
    layer_kind = kind_of(owner) if is_candidate(owner) else None
    if layer_kind is not None and slot.name != layer_kind.weight:
        return None
    common = common_use([call for call, _ in calls], parameter.shape)
    operation, layout = common or (None, None)
    kind = layer_kind.name if layer_kind is not None else calls[0][0].name if layout is None else layout.name
    reason, note = blocker_of_weight(parameter, kind, operation, uses.owners, reads, uses.shards)
    if reason is None and doubt:
        reason, note = Reason.READ_ELSEWHERE, doubt
    if common is None:
        reason, note = Reason.READ_ELSEWHERE, USED_TWICE
    name = slot.owner if layer_kind is not None else slot.path
    site = Site(name=name, layer=owner, kind=kind, operation=operation, calls=len(calls), slot=slot)
    return replace(site, layout=layout, reason=reason, note=note)


def _in_order(root: nn.Module, sites: list[Site]) -> list[Site]:
    """Sort sites as Find lists them: by the module, then by its parameters."""
    positions = {path: index for index, (path, _) in enumerate(root.named_modules())}

    def position(site: Site) -> tuple[int, int]:
        names = list(site.layer._parameters)
        return positions[site.layer_path], names.index(site.slot.name) if site.slot and site.slot.name in names else 0

    return sorted(sites, key=position)


def _with_flows_of_either_mode(sites: Sequence[Site], runs: _Runs) -> list[Site]:
    """Attach to each site what flows into it in eval mode; for sites that eval mode does not reach, in train mode."""
    runs.in_eval.reads |= runs.reads_in_train or frozenset()
    in_graph = [id(site.layer) in runs.uses.traced and bool(site.nodes) for site in sites]
    observed = list(map(_with_flows, sites, repeat(runs.in_eval), in_graph))
    missed = [
        index
        for index, (site, after) in enumerate(zip(sites, observed, strict=True))
        if site.is_open and after.is_missed and (after.is_open or after.reason is Reason.NOT_CALLED)
    ]
    if not runs.program.processes.broadcast_object(bool(missed)):
        return observed
    in_train = runs.in_train  # on every process, also where nothing is missed
    for index in missed:
        if isinstance(in_train, Observed):
            observed[index] = _with_flows(sites[index], in_train, in_graph[index])
        elif sites[index].reason is None:  # whether train mode calls it is not known
            observed[index] = replace(sites[index], flows=())
    return observed


def _with_flows(site: Site, observed: Observed, in_graph: bool) -> Site:
    """Attach to a site what a run showed: its calls, what flows into them, and whether anything else reads its weight."""
    seen = observed.functional.get(id(site.weight), []) if site.slot is not None else []
    # Without calls it is a layer, or a parameter that is factorized already.
    all_entered = [each for _, each in seen] or observed.entering.get(site.path, [])
    if not all_entered and site.reason is Reason.READ_ELSEWHERE and not site.nodes:
        return site  # neither a graph nor a run shows what enters it
    # A call with an empty batch, as of an expert that gets no tokens, computes nothing.
    calls = [(call, each) for call, each in seen if math.prod(each.shape)]
    entered = [each for each in all_entered if math.prod(each.shape)]
    if all_entered and not entered and site.reason is None:
        note = "the example inputs send no values through it"
        return replace(site, flows=(), calls=len(all_entered), reason=Reason.NOT_CALLED, note=note)
    flows = tuple(_flow(each, site, site.operation) for each in entered) if site.operation is not None else ()
    if calls and site.weight is not None and site.operation is not None and site.operation.dims:
        operations = (call.operation(site.weight.shape) for call, _ in calls)
        flows = tuple(replace(flow, operation=operation) for flow, operation in zip(flows, operations, strict=False))
    if site.reason is None and id(site.weight) in observed.reads:
        note = f"forward reads its weight {'besides' if entered else 'without'} calling it"
        return replace(site, flows=flows, calls=len(entered), reason=Reason.READ_ELSEWHERE, note=note)
    if flows or in_graph or site.reason is not None:
        return replace(site, flows=flows, calls=max(site.calls, len(entered)) if in_graph else len(entered))
    return replace(site, flows=(), calls=0, reason=Reason.NOT_CALLED, note="the example inputs do not reach it")


def _flow(entered: Entered, site: Site, operation: Operation) -> Flow:
    """Return the flow of one call, computed in the dtype of the site's weight and in the layout of either operand."""
    weights = [weight for weight in site.weights if isinstance(weight, Tensor)]
    setting = replace(
        entered.setting,
        dtype=weights[0].dtype if weights else entered.setting.dtype,
        channels_last=entered.setting.channels_last or any(map(is_channels_last, weights)),
    )
    return replace(flow_of(entered.shape, operation), setting=setting)


def _as_in_loop(site: Site, loop: LoopSettings) -> Site:
    if not site.flows or site.operation is None:
        return site
    return replace(site, flows=tuple(loop.apply(site.weight_path, flow) for flow in site.flows))


def flow_of(shape: tuple[int, ...], operation: Operation) -> Flow:
    """Return the flow of a tensor of this shape into an operation.

    >>> flow_of((8, 3, 32, 32), Operation.pointwise(3, 4, 2))
    Flow(samples=8, size=(32, 32), operation=None)
    >>> flow_of((8, 50, 128), Operation(in_channels=128, out_channels=4))
    Flow(samples=400, size=(), operation=None)
    """
    if operation.dims == 0:
        return Flow(math.prod(shape[:-1]))
    return Flow(math.prod(shape[: -operation.dims - 1]), shape[len(shape) - operation.dims :])


def _broadcast_sites(processes: Processes, sites: Sequence[Site]) -> list[Site]:
    """Give all processes what the first has observed, so that all decide alike, whatever their own batches are."""
    observed = [(site.flows, site.calls, site.reason, site.note) for site in sites]
    return [
        replace(site, flows=flows, calls=calls, reason=reason, note=note)
        for site, (flows, calls, reason, note) in zip(sites, processes.broadcast_object(observed), strict=True)
    ]


def _describe(inputs: Inputs) -> str:
    arguments, named = split_inputs(inputs)
    parts = [*map(_describe_value, arguments), *(f"{key}={_describe_value(value)}" for key, value in named.items())]
    return f"({', '.join(parts)})"


def _describe_value(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return type(value).__name__

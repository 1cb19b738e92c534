"""Graphs -> sites: every convolution and linear layer or functional call, with the reason to keep it if there is one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tdfx.factors.operation import Operation
from tdfx.kinds.products import common_use
from tdfx.kinds.registry import is_candidate, kind_of, operation_of
from tdfx.layers.alterations import alteration_of
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.passes.analysis.blockers import (
    USED_TWICE,
    blocker_of_layer,
    blocker_of_weight,
    layers_inside_leaves,
    note_of_reader,
)
from tdfx.passes.analysis.readers import read_weights
from tdfx.passes.analysis.uses import Uses, uses_of
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import ParameterSlot, Program, Site
from tdfx.plans.plan import Reason

_WITHOUT_LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Modules of torch.nn that compute linear maps with parameters of their own, which nothing can stand in for."""


class Find(Pass[PassResult]):
    """List the sites of a traced program in the order of its state_dict."""

    name = "find"

    def run(self, program: Program) -> PassResult:
        """Look at every layer and every parameter once; a layer called twice is one site with two calls."""
        aliases = _aliases(program.module)
        found = _sites(program.module, uses_of(program))
        listed, named = read_weights(program)
        sites = tuple(
            replace(_read_elsewhere(site, named | listed), aliases=aliases.get(site.name, ())) for site in found
        )
        return PassResult(replace(program, sites=sites), tuple(Change(site.name, "found") for site in sites))

    def ensures(self, before: Program, result: PassResult) -> None:
        """Every convolution and linear layer is a site, once."""
        modules = list(before.module.modules())
        factors = {factor for layer in modules if isinstance(layer, Factorized) for factor in layer.modules()}
        layers = {name for name, layer in before.module.named_modules() if is_candidate(layer) and layer not in factors}
        names = [site.name for site in result.program.sites]
        self.check(layers <= set(names), "every convolution and linear layer is a site")
        self.check(len(names) == len(set(names)), "every site is listed once")


def _read_elsewhere(site: Site, reads: Mapping[int, str]) -> Site:
    """Keep a site whose weight is read, or may be, by code that no graph shows."""
    why = reads.get(id(site.weight)) if site.reason is None else None
    return site if why is None else replace(site, reason=Reason.READ_ELSEWHERE, note=why)


def _sites(root: nn.Module, uses: Uses) -> Iterator[Site]:
    inside = layers_inside_leaves(root)
    seen: set[int] = set()
    for path, module in root.named_modules():
        if isinstance(module, Factorized):
            yield _factorized_site(path, module, uses, root)
        elif is_candidate(module):
            has_factorized_weight = isinstance(module._modules.get(kind_of(module).weight), FactorizedParameter)
            if not has_factorized_weight and not issubclass(inside.get(id(module), nn.Module), Factorized):
                yield _layer_site(path, module, uses, inside)
        else:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield from _parameter_site(ParameterSlot(path, name), module, parameter, uses)


def _aliases(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the further paths of every module that is held at several, by its first path."""
    paths: defaultdict[int, list[str]] = defaultdict(list)
    for path, module in root.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
    return {first: tuple(others) for first, *others in paths.values() if others}


def _layer_site(path: str, layer: nn.Module, uses: Uses, inside: Mapping[int, type[nn.Module]]) -> Site:
    kind = kind_of(layer)
    weight = layer._parameters.get(kind.weight)
    if _is_used_by_functions_only(layer, weight, uses) and id(layer) not in inside:
        return _functional_site(path, kind.name, ParameterSlot(path, kind.weight), layer, uses)
    nodes = uses.calls.get(id(layer), ())
    # Outside every graph the number of calls is not known; a run with example inputs counts them.
    calls = uses.count(nodes) if id(layer) in uses.traced else 1
    reason, note = blocker_of_layer(layer, weight, calls, uses, inside)
    operation = None if reason is Reason.UNINITIALIZED else operation_of(layer)
    site = Site(name=path, layer=layer, kind=kind.name, operation=operation, calls=calls, nodes=nodes)
    return replace(site, reason=reason, note=note)


def _is_used_by_functions_only(layer: nn.Module, weight: Tensor | None, uses: Uses) -> bool:
    if weight is None or (uses.calls.get(id(layer)) and kind_of(layer).is_intact(layer)):
        return False
    return bool(uses.functional.get(id(weight))) and not parametrize.is_parametrized(layer)


def _parameter_site(slot: ParameterSlot, owner: nn.Module, parameter: nn.Parameter, uses: Uses) -> Iterator[Site]:
    """Yield the site of a parameter that no layer kind holds; none if it is the weight of no convolution or linear map."""
    if functional_uses := uses.functional.get(id(parameter)):
        yield _functional_site(slot.path, functional_uses[0].call.name, slot, owner, uses)
    elif isinstance(owner, _WITHOUT_LAYERS) and "weight" in slot.name and parameter.dim() == 2:
        operation = Operation(in_channels=parameter.shape[1], out_channels=parameter.shape[0])
        site = Site(name=slot.path, layer=owner, kind=type(owner).__name__, operation=operation, calls=0, slot=slot)
        yield replace(site, reason=Reason.READ_ELSEWHERE, note=note_of_reader(type(owner)))


def _functional_site(name: str, kind: str, slot: ParameterSlot, owner: nn.Module, uses: Uses) -> Site:
    """Return the site of a parameter, held by ``owner``, that the graphs pass to a function as its weight."""
    parameter = owner._parameters[slot.name]
    assert parameter is not None
    functional_uses = uses.functional[id(parameter)]
    # Its factors will take stride, padding and dilation from each call, so any call gives the operation.
    common = common_use([use.call for use in functional_uses], parameter.shape)
    operation, layout = common or (None, None)
    kind = kind if layout is None else layout.name
    nodes = tuple(use.node for use in functional_uses if use.node is not None)
    calls = uses.count(nodes) or len(functional_uses)
    reason, note = blocker_of_weight(parameter, kind, operation, uses.owners, uses.reads, uses.shards)
    if common is None:
        reason, note = Reason.READ_ELSEWHERE, USED_TWICE
    site = Site(name=name, layer=owner, kind=kind, operation=operation, calls=calls, nodes=nodes, slot=slot)
    return replace(site, layout=layout, reason=reason, note=note)


def _factorized_site(path: str, layer: Factorized, uses: Uses, root: nn.Module) -> Site:
    original = layer.origin.layer
    slot = ParameterSlot.of(path) if isinstance(layer, FactorizedParameter) else None
    if slot is not None and is_candidate(root.get_submodule(slot.owner)):
        path = slot.owner
    functional = (use.node for use in uses.functional.get(id(layer), ()) if use.node is not None)
    nodes = (*uses.calls.get(id(layer), ()), *functional)
    calls = uses.count(nodes) if id(layer) in uses.traced else 1
    kind, operation = kind_of(original).name, operation_of(original)
    site = Site(name=path, layer=layer, kind=kind, operation=operation, calls=calls, nodes=nodes, slot=slot)
    if alteration := alteration_of(layer):
        return replace(site, reason=Reason.CUSTOM_FORWARD, note=f"its factors were altered: {alteration}")
    note = f"{layer.origin.scheme} at {'/'.join(map(str, layer.origin.ranks))}"
    return replace(site, reason=Reason.FACTORIZED, note=note)

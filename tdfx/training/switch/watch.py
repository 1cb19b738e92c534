"""Watch the stable ranks of a model's sites while it trains, at about one percent of the time.

A look takes a few products of each weight with a vector: power iterations for the largest singular value, which start from
the vector of the last look, and the image of a fixed random vector, which shows whether the weight has turned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import ModelError
from tdfx.kinds.registry import kind_of
from tdfx.layers.placement import full
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.pipeline import find_sites
from tdfx.passes.planning.site_cost import current_chain, flops_of
from tdfx.passes.program import Program, Site
from tdfx.plans.plan import Emit
from tdfx.policies.policy import Policy
from tdfx.training.switch.when import Settled
from tdfx.wrappers.unwrap import Unwrapped

_SHARE = 0.01
"""Largest share of the training's time that looks may take."""

_ITERATIONS, _FIRST_ITERATIONS = 2, 12
"""Power iterations in each look, and in the first one, which starts from a random vector."""

_FLOPS_PER_READ = 60
"""Operations in the time that a value takes to come from memory, which limits products with a vector; as in Modelled."""


def modelled_seconds(policy: Policy, program: Program) -> dict[str, float]:
    """Return for each site that is called the modelled time of its training step, in seconds."""
    return {site.name: _seconds(policy, site) for site in _called(program)}


def _interval(every: int, values: int, flops: Sequence[int | None]) -> int:
    """Return the steps between two looks: ``every``, or as many more as keep looks within their share of the time."""
    counted = [count for count in flops if count is not None]
    if len(counted) < len(flops) or not sum(counted):
        return every
    look = values * _FLOPS_PER_READ * (2 * _ITERATIONS + 2)
    # A backward pass takes twice the operations of the forward.
    return max(every, math.ceil(look / (_SHARE * 3 * sum(counted))))


def _called(program: Program) -> list[Site]:
    return [site for site in program.sites if site.operation is not None and site.calls]


def _path(site: Site) -> str:
    return site.slot.path if site.slot is not None else f"{site.name}.{kind_of(site.layer).weight}".removeprefix(".")


def _seconds(policy: Policy, site: Site) -> float:
    chain = current_chain(site)
    assert site.operation is not None
    flows = site.flows or (None,)
    operations = [(flow.operation if flow is not None else None) or site.operation for flow in flows]
    # Only the ratio between sites counts, which is not worth a measurement.
    cost = policy.cost.modelled if isinstance(policy.cost, MeasuringCost) else policy.cost
    return sum(cost.seconds(chain(operation), flow) for operation, flow in zip(operations, flows, strict=True))


@dataclass(slots=True)
class Watched:
    """The state of one watched site."""

    path: str
    """Path of its weight."""
    vector: Tensor | None = None
    """The right singular vector of the largest singular value, as the power iterations have it so far."""
    start: Tensor | None = None
    """The weight's image of a fixed random vector at the first look."""
    ranks: tuple[float, ...] = ()
    """Stable ranks at the last looks, one more than the window at most."""
    turned: float = 0.0
    """Sine of the angle by which that image has turned since, in [0, 1]."""


@dataclass(slots=True)
class RankWatch:
    """The sites whose ranks are watched until they settle."""

    when: Settled
    interval: int
    """Steps between two looks."""
    sites: dict[str, Watched]
    looks: int = 0
    """Looks so far."""
    probes: dict[int, Tensor] = field(default_factory=dict)
    """Length -> the fixed random vector; not part of the state, since its seed is fixed."""

    @classmethod
    def begin(cls, when: Settled, wrapped: Unwrapped, policy: Policy, inputs: Inputs | None, emit: Emit) -> RankWatch:
        """Return a watch over the sites that a policy wants and that may be rewritten; their weights are not read."""
        program = find_sites(wrapped.model, emit, wrapped.processes, shards=wrapped.shards)
        if inputs is not None:
            program = ObserveInputs(inputs)(program).program
        wanted = [site for site in program.sites if site.reason is None and policy.for_site(*site.names) is not None]
        values = sum(site.weight.numel() for site in wanted if site.weight is not None)
        flops = [flops_of(site, current_chain(site)) for site in _called(program)]
        return cls(when, _interval(when.every, values, flops), {site.name: Watched(_path(site)) for site in wanted})

    def next_look(self, step: int) -> int:
        """Return the next step at which to look, or the timeout if that is earlier."""
        look = (step // self.interval + 1) * self.interval
        return look if self.when.timeout is None else min(look, max(step + 1, self.when.timeout))

    @torch.no_grad()
    def look(self, model: nn.Module) -> RankWatch:
        """Return the watch after one more look; this one stays as it was."""
        measured = [self._measure(site, _weight(model, name, site.path)) for name, site in self.sites.items()]
        device = measured[0][2].device
        # One transfer for all sites, so that the host waits for the device once.
        numbers = torch.stack([pair.to(device) for _, _, pair in measured]).tolist()
        sites = {}
        for (name, site), (vector, start, _), (rank, turned) in zip(self.sites.items(), measured, numbers, strict=True):
            ranks = (*site.ranks, rank)[-(self.when.window + 1) :]
            sites[name] = Watched(site.path, vector, start, ranks, turned)
        return replace(self, sites=sites, looks=self.looks + 1)

    def settled(self) -> list[str]:
        """Return the sites whose weight has turned and whose stable rank has held."""
        return [
            name
            for name, site in self.sites.items()
            if len(site.ranks) > self.when.window
            and site.turned >= self.when.moved
            and max(site.ranks) - min(site.ranks) <= self.when.tolerance * site.ranks[-1]
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return all except the settings, in plain types and tensors."""
        sites = {name: {**asdict(site), "ranks": list(site.ranks)} for name, site in self.sites.items()}
        return {"interval": self.interval, "looks": self.looks, "sites": tree_map_only(Tensor, Tensor.cpu, sites)}

    @classmethod
    def of_state(cls, when: Settled, state: Mapping[str, Any]) -> RankWatch:
        """Make a watch from what ``state_dict`` gave."""
        sites = {
            name: Watched(site["path"], site["vector"], site["start"], tuple(site["ranks"]), site["turned"])
            for name, site in state["sites"].items()
        }
        return cls(when, int(state["interval"]), sites, int(state["looks"]))

    def _measure(self, site: Watched, w_oi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the singular vector, the first image of the probe, and the pair (stable rank, turn) on the device."""
        probe = self._probe(w_oi)
        vector = probe if site.vector is None else site.vector.to(w_oi)
        image, probed = (w_oi @ torch.stack([vector, probe], dim=1)).unbind(1)
        start = probed.clone() if site.start is None else site.start.to(w_oi)
        for _ in range(_FIRST_ITERATIONS if site.vector is None else _ITERATIONS):
            back = image @ w_oi
            # A vector of zeros would stay zero after the weight has left zero.
            vector = torch.where(back.any(), back / _norm(back), probe)
            image = w_oi @ vector
        rank = (_norm(w_oi) / _norm(image)) ** 2
        cosine = (probed / _norm(probed)) @ (start / _norm(start))
        # A weight of zeros has not turned; one that left zero has.
        turned = (1 - cosine.square()).clamp(min=0).sqrt() * probed.any()
        return vector, start, torch.stack([rank, turned]).float()

    def _probe(self, w_oi: Tensor) -> Tensor:
        length = w_oi.shape[1]
        probe = self.probes.get(length)
        if probe is None or probe.device != w_oi.device or probe.dtype != w_oi.dtype:
            drawn = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            probe = self.probes[length] = (drawn / drawn.norm()).to(w_oi)
        return probe


def _norm(values: Tensor) -> Tensor:
    """Return the Frobenius norm, at least the smallest normal number, so that zeros can be divided by it."""
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.clamp(min=torch.finfo(values.dtype).tiny)


def _weight(model: nn.Module, name: str, path: str) -> Tensor:
    """Return a site's weight as a matrix in float32 or float64."""
    try:
        weight = full(model.get_parameter(path)).flatten(1)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no weight {path!r}, the weight of the watched site {name!r}: it is another model, "
            f"or it was rewritten since. Pass the model that the last step() returned."
        ) from error
    return weight if weight.dtype in {torch.float32, torch.float64} else weight.float()

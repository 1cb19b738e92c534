"""Watching the stable ranks of a model's sites while it trains, at next to no cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import ModelError
from tdfx.kinds.registry import kind_of
from tdfx.layers.placement import full
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.planning.site_cost import current_chain, flops_of
from tdfx.passes.program import Program, Site
from tdfx.plans.plan import Emit
from tdfx.policies.policy import Policy
from tdfx.training.switch.when import Settled
from tdfx.wrappers.unwrap import Wrapped

_SHARE = 0.01
"""Largest share of the training's time that looks may take."""

_ITERATIONS = 2
"""Power iterations in each look but the first."""

_FIRST_ITERATIONS = 12
"""Power iterations in the first look, which starts from a random vector."""

_FLOPS_PER_READ = 60
"""Operations in the time that a value takes to come from memory, for which products with a vector wait; as in Modelled."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a model's sites before any weight is looked at."""

    paths: dict[str, str]
    """Site that the policy wants and that may be rewritten -> path of its weight."""
    seconds: dict[str, float]
    """Site that is called -> time of its training step by the policy's cost."""
    values: int
    """Values in the weights of ``paths``."""
    step_flops: int | None
    """Operations of a training step in all sites; None without example inputs."""

    def interval(self, every: int) -> int:
        """Return the steps between two looks: ``every``, or as many more as keep looks cheap."""
        if not self.step_flops:
            return every
        look = self.values * _FLOPS_PER_READ * (2 * _ITERATIONS + 2)
        return max(every, math.ceil(look / (_SHARE * self.step_flops)))


def survey(wrapped: Wrapped, policy: Policy, inputs: Inputs | None, emit: Emit) -> Survey:
    """Look at a model's sites, not at their weights."""
    start = Program(module=wrapped.model, emit="modules" if wrapped.shards else emit, shards=wrapped.shards)
    program = Find()(Trace()(start).program).program
    if inputs is not None:
        program = ObserveInputs(inputs, wrapped.together, wrapped.ready, wrapped.agree)(program).program
    wanted = [one for one in program.sites if one.reason is None and policy.for_site(*one.names) is not None]
    called = [one for one in program.sites if one.operation is not None and one.calls]
    work = [flops_of(one, current_chain(one)) for one in called]
    known = [one for one in work if one is not None]
    return Survey(
        paths={one.name: _path(one) for one in wanted},
        seconds={one.name: _seconds(policy, one) for one in called},
        values=sum(one.weight.numel() for one in wanted if one.weight is not None),
        # A backward pass takes twice the operations of the forward.
        step_flops=3 * sum(known) if len(known) == len(work) else None,
    )


def _path(site: Site) -> str:
    if site.slot is not None:
        return site.slot.path
    weight = kind_of(site.layer).weight
    return f"{site.name}.{weight}" if site.name else weight


def _seconds(policy: Policy, site: Site) -> float:
    chain = current_chain(site)
    assert site.operation is not None
    flows = site.flows or (None,)
    operations = [(flow.operation if flow is not None else None) or site.operation for flow in flows]
    # What a measurement would take is not worth it: only the parts that sites have in a step count.
    cost = policy.cost.modelled if isinstance(policy.cost, MeasuringCost) else policy.cost
    return sum(cost.seconds(chain(one), flow) for one, flow in zip(operations, flows, strict=True))


@dataclass(slots=True)
class Watched:
    """What is remembered of one site that is watched."""

    path: str
    """Path of its weight."""
    vector: Tensor | None = None
    """The right singular vector of the largest singular value, as far as it has come."""
    start: Tensor | None = None
    """The weight's image of a fixed random vector at the first look."""
    ranks: tuple[float, ...] = ()
    """Stable ranks at the last looks, one more than the window at most."""
    turned: float = 0.0
    """Sine of the angle by which that image has turned since."""


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
    """Length -> the fixed random vector; made again where it is missing."""

    @classmethod
    def begin(cls, when: Settled, found: Survey) -> RankWatch:
        """Return a watch over all sites of a survey."""
        return cls(when, found.interval(when.every), {name: Watched(path) for name, path in found.paths.items()})

    def next_look(self, step: int) -> int:
        """Return the next step at which there is something to do."""
        look = (step // self.interval + 1) * self.interval
        return look if self.when.timeout is None else min(look, max(step + 1, self.when.timeout))

    @torch.no_grad()
    def look(self, model: nn.Module) -> RankWatch:
        """Return the watch after one more look; this one stays as it was.

        Raises:
            ModelError: The model lacks a weight that is watched.
        """
        seen = [self._measure(name, one, _weight(model, name, one.path)) for name, one in self.sites.items()]
        # One transfer for all sites, so that a device is waited for once.
        numbers = torch.stack([one[2].to(seen[0][2].device) for one in seen]).tolist() if seen else []
        sites = {}
        for (name, old), (vector, start, _), (rank, turned) in zip(self.sites.items(), seen, numbers, strict=True):
            ranks = (*old.ranks, rank)[-(self.when.window + 1) :]
            sites[name] = replace(old, vector=vector, start=start, ranks=ranks, turned=turned)
        return RankWatch(self.when, self.interval, sites, self.looks + 1, self.probes)

    def settled(self) -> list[str]:
        """Return the sites whose weight has turned and whose stable rank has held."""
        return [name for name, site in self.sites.items() if self._is_settled(site)]

    def state_dict(self) -> dict[str, Any]:
        """Return all but the settings, in plain types and tensors."""
        sites = {}
        for name, one in self.sites.items():
            state = {key: getattr(one, key) for key in _KEYS}
            state["ranks"] = list(one.ranks)
            for key in ("vector", "start"):
                state[key] = None if state[key] is None else state[key].cpu().clone()
            sites[name] = state
        return {"interval": self.interval, "looks": self.looks, "sites": sites}

    @classmethod
    def of_state(cls, when: Settled, state: Mapping[str, Any]) -> RankWatch:
        """Make a watch from what ``state_dict`` gave."""
        sites = {
            name: Watched(**{**{key: site[key] for key in _KEYS}, "ranks": tuple(site["ranks"])})
            for name, site in state["sites"].items()
        }
        return cls(when, int(state["interval"]), sites, int(state["looks"]))

    def _is_settled(self, one: Watched) -> bool:
        if len(one.ranks) <= self.when.window or one.turned < self.when.moved:
            return False
        return max(one.ranks) - min(one.ranks) <= self.when.tolerance * one.ranks[-1]

    def _measure(self, name: str, one: Watched, w_oi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the singular vector, the image of the probe, and the stable rank with the turn, still on the device."""
        probe = self._probe(w_oi)
        vector = probe if one.vector is None else one.vector.to(w_oi)
        image, seen = (w_oi @ torch.stack([vector, probe], dim=1)).unbind(1)
        start = seen.clone() if one.start is None else one.start.to(w_oi)
        for _ in range(_FIRST_ITERATIONS if one.vector is None else _ITERATIONS):
            back = image @ w_oi
            # Zeros would stay zeros when the weight no longer is.
            vector = torch.where(back.any(), back / _norm(back), probe)
            image = w_oi @ vector
        rank = (_norm(w_oi) / _norm(image)) ** 2
        cosine = (seen / _norm(seen)) @ (start / _norm(start))
        # A weight of zeros has not turned; one that left zero has.
        turned = (1 - cosine.square()).clamp(min=0).sqrt() * seen.any()
        return vector, start, torch.stack([rank, turned]).float()

    def _probe(self, w_oi: Tensor) -> Tensor:
        length = w_oi.shape[1]
        found = self.probes.get(length)
        if found is None or found.device != w_oi.device or found.dtype != w_oi.dtype:
            drawn = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            found = self.probes[length] = (drawn / drawn.norm()).to(w_oi)
        return found


_KEYS = ("path", "vector", "start", "ranks", "turned")


def _norm(values: Tensor) -> Tensor:
    """Return the Frobenius norm, kept from zero so that a weight of zeros gives numbers."""
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm.clamp(min=torch.finfo(values.dtype).tiny)


def _weight(model: nn.Module, name: str, path: str) -> Tensor:
    """Return a site's weight as a matrix, in a dtype in which to measure."""
    try:
        weight = full(model.get_parameter(path)).flatten(1)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no weight {path!r}, which is that of site {name!r} and is watched: the model was "
            f"rewritten by another hand, or is another one. Pass the model that the last step() returned."
        ) from error
    return weight if weight.dtype in {torch.float32, torch.float64} else weight.float()

"""The compiler from the model to the plan, to the factorized model and back, in the order of its passes.

Every entry point calls these functions: ``tdfx.plan``, ``tdfx.rewrite``, ``tdfx.merge``, ``tdfx.load``, ``Switch`` and
``tdfx inspect``. A ``Planned`` holds all that was worked out for a plan, so that a rewrite by it does nothing twice.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import get_args

from torch import nn

from tdfx.cost.modelled import MeasuringCost
from tdfx.distributed.processes import Processes, Solo
from tdfx.errors import PolicyError
from tdfx.layers.holders import Surroundings
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.loop import LoopSettings, warn_of_full_precision
from tdfx.passes.analysis.moments import Moments
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.planning.attach_metric import AttachMetric
from tdfx.passes.planning.select import Select
from tdfx.passes.planning.spectra import SpectrumCache
from tdfx.passes.planning.step_time import TimeStep
from tdfx.passes.program import Program
from tdfx.passes.transform.merge import Merge, Merged
from tdfx.passes.transform.rewrite import Init, Rewrite, Rewritten
from tdfx.plans.plan import Emit, Plan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan for a model, with the program and the spectra that it was made from."""

    program: Program
    spectra: SpectrumCache

    @property
    def plan(self) -> Plan:
        """The decisions."""
        assert self.program.plan is not None
        return self.program.plan


def find_sites(
    model: nn.Module,
    emit: Emit = "graph",
    processes: Processes | None = None,
    *,
    shards: bool = False,
    surroundings: Surroundings | None = None,
) -> Program:
    """Trace a model, out of its wrappers, and find its sites.

    Args:
        model: Trained by ``processes``, or by this one alone.
        emit: How a rewritten model is to be given back.
        shards: Whether each process holds a part of every parameter.
        surroundings: The model around this one, if this is a part of one.

    Raises:
        PolicyError: ``emit`` is none of the known words.
    """
    if emit not in get_args(Emit):
        raise PolicyError(
            f"emit={emit!r} is not known: a model is given back as 'graph' (a GraphModule) or as 'modules' (its own class)."
        )
    notes: tuple[str, ...] = ()
    if shards and emit == "graph":
        emit = "modules"
        kind = type(model).__name__
        notes = (f"given back as {kind}, not as a graph: fully_shard gathers parameters where modules are called",)
    program = Program(
        module=model, emit=emit, notes=notes, surroundings=surroundings, processes=processes or Solo(), shards=shards
    )
    program = Trace()(program).program
    return Find()(program).program


def make_plan(
    program: Program,
    policy: Policy,
    inputs: Inputs | None,
    *,
    moments: Moments | None = None,
    loop_seconds: float | None = None,
    loop: LoopSettings | None = None,
) -> Planned:
    """Decide for every site by a policy.

    ``moments`` were collected in training steps. ``loop_seconds`` is the time of a step in the training loop, and ``loop``
    what is in force there, if known; moments know it too.
    """
    spent = 0.0
    if loop is None and moments is not None:
        loop = moments.loop
    budget = policy.rank if isinstance(policy.rank, Budget) and policy.rank.is_of_time else None
    if budget is not None and (inputs is None or not isinstance(policy.cost, MeasuringCost)):
        program = replace(program, notes=(*program.notes, _modelled(policy, inputs)))
    with nullcontext() if loop is None else loop.restored():
        if inputs is not None:
            program = ObserveInputs(inputs, loop)(program).program
            if loop is None and isinstance(policy.cost, MeasuringCost) and policy.cost.autocast is None:
                warn_of_full_precision(flow for site in program.sites for flow in site.flows or ())
            # Where no site is decided, or every one is rewritten whatever it costs, nothing is timed; in shards only what a
            # budget needs.
            is_wanted = any(site.is_open and policy.for_site(*site.names) is not None for site in program.sites)
            timed_anyway = is_wanted and policy.min_gain > 0 and not program.shards
            timed_for_budget = budget is not None and (is_wanted or budget.strict)
            if isinstance(policy.cost, MeasuringCost) and (timed_for_budget or timed_anyway):
                timed = TimeStep(
                    inputs,
                    policy.cost,
                    strict=budget is not None and budget.strict,
                    needed=budget is not None,
                    loop_seconds=loop_seconds,
                )(program)
                program, spent = timed.program, timed.spent
    program = AttachMetric(moments, policy)(program).program
    selected = Select(policy, spent)(program)
    return Planned(selected.program, selected.spectra)


def _modelled(policy: Policy, inputs: Inputs | None) -> str:
    """Return the note that a budget of time was not kept by measured times."""
    why = "there are no example inputs" if inputs is None else f"{type(policy.cost).__name__} measures nothing"
    return f"{policy.rank!r} is kept by modelled times, since {why}: from operation counts, and no prediction of a step"


def use_plan(program: Program, plan: Plan, moments: Moments | None = None) -> Planned:
    """Take over a plan that was made before, in another process perhaps; nothing of its weights was read."""
    plan = program.processes.broadcast_object(plan)
    program = AttachMetric(moments, plan)(program).program
    return Planned(replace(program, plan=plan), SpectrumCache())


def rewrite_by(planned: Planned, init: Init = "weight") -> Rewritten:
    """Factorize what a plan says; ``init`` is what factors start from."""
    return Rewrite(planned.spectra, init)(planned.program)


def merge_back(model: nn.Module, processes: Processes) -> Merged:
    """Give a factorized model its original architecture back."""
    return Merge()(Program(module=model, processes=processes))

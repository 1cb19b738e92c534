"""What reports show of a model besides its plan: the spectra of its weights, and its graph; writing reports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tdfx.checkpoint.atomic import atomic_writer
from tdfx.errors import ModelError, ReportError
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.analysis.shapes import ObserveInputs
from tdfx.passes.pipeline import find_sites
from tdfx.plans.plan import Plan
from tdfx.report.network import Network, network_of
from tdfx.report.spectra import SpectrumCurve, curves_of
from tdfx.wrappers.unwrap import unwrap


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """A model together with its plan, ready to be drawn."""

    plan: Plan
    spectra: Mapping[str, tuple[SpectrumCurve, ...]]
    """Site -> a curve for each of its ranks; without sites that no scheme fits or that lie on the meta device."""
    network: Network
    """The model's operations, and the edges between them."""


def look(model: nn.Module, plan: Plan, *, example_inputs: Inputs | None = None) -> ModelView:
    """Read the spectra of a model's weights and its graph, once for several reports; the model is left as it was.

    Args:
        model: The model that the plan was made for.
        plan: What ``tdfx.plan`` returned.
        example_inputs: As for ``tdfx.plan``; needed if only a run shows all sites.

    Raises:
        ModelError: The model is sharded, so no process holds its weights.
        PlanError: The plan was made for another model.
        InputError: The model does not accept the example inputs.
        WeightError: A weight holds NaN or infinity.
    """
    wrapped = unwrap(model)
    if wrapped.shards:
        raise ModelError(
            "The model is sharded by fully_shard, and a report reads whole weights on one process. Make the report from an "
            "unsharded copy, for example one loaded from a checkpoint, or write only plan.to_json()."
        )
    program = find_sites(wrapped.model)
    if example_inputs is not None:
        program = ObserveInputs(example_inputs)(program).program
    return ModelView(plan=plan, spectra=curves_of(program.sites, plan), network=network_of(program))


def write_report(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a report to a file; if that fails, raise ReportError and leave what was there."""
    try:
        with atomic_writer(path) as file:
            file.write(data)
    except OSError as error:
        raise ReportError(
            f"The report {str(path)!r} could not be written: {error}. What was there before is unchanged. Name a file in a "
            f"folder that exists, with room on its disk."
        ) from error

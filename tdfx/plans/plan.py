"""What will be done to a model, site by site: printed as a table, saved as JSON."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from tdfx.checks import FieldError, read_record
from tdfx.errors import PlanError
from tdfx.plans.decisions import Decisions, Emit, Reason, SitePlan, part_of_step
from tdfx.plans.table import plan_view, render_plain

__all__ = ["Emit", "Plan", "Reason", "SitePlan", "part_of_step"]

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Decisions):
    """The decisions for every site of one model; printing it shows a table."""

    def check(self, model: Any, *, example_inputs: Any, **settings: Any) -> Any:
        """Time the real training step before and after the rewrite, and say how good the prediction was.

        Args:
            model: What ``rewrite`` made by this plan.
            example_inputs: As for ``plan``.
            settings: As for ``tdfx.check_step``: ``dense``, ``optimizer``, ``autocast``, ``rounds``.

        Returns:
            A ``tdfx.StepCheck``, as ``tdfx.check_step`` returns it.

        Raises:
            PlanError: The plan has no measured times.
        """
        # Imported by name, because it builds on this file.
        training = importlib.import_module("tdfx.training.step_check")
        return training.check_step(self, model, example_inputs=example_inputs, **settings)

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the plan as JSON text, from which ``from_json`` makes an equal plan."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: The text is not JSON, is of another format, or has a field that is unknown, missing or mistyped.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            message = f"This is not a plan: it is not JSON ({error}). Pass the text that Plan.to_json gave."
            raise PlanError(message) from error
        version = data.pop("format", None) if isinstance(data, dict) else None
        if type(version) is not int or version != _FORMAT:
            raise PlanError(
                f"This plan has format {version!r}, and this tdfx reads format {_FORMAT}: it is no plan, or another version "
                f"wrote it. Write it again with Plan.to_json of this version."
            )
        try:
            return read_record(Plan, data)
        except FieldError as error:
            site = data["sites"][error.record[1]] if error.record else None
            owner = f"Site {site.get('name')!r}" if isinstance(site, dict) else "The plan"
            raise PlanError(f"{owner} {error}. Pass the text that Plan.to_json gave, unchanged.") from error

    def __str__(self) -> str:
        return render_plain(plan_view(self))

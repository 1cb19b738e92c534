"""Log a plan as numbers, for TensorBoard and every other logger that takes a tag, a value and a step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol

from tdfx.errors import PolicyError
from tdfx.plans.plan import Plan, SitePlan


class Writer(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` and similar loggers have."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None) -> Any:
        """Log a value under a tag."""


class StepTimes(Protocol):
    """The times of a ``StepCheck``."""

    @property
    def seconds_before(self) -> float: ...  # noqa: D102
    @property
    def seconds_after(self) -> float: ...  # noqa: D102
    @property
    def seconds_predicted(self) -> float: ...  # noqa: D102


def log_plan(writer: Writer, plan: Plan, step: int, *, check: StepTimes | None = None) -> None:
    """Log the ranks of a plan, the energy they keep, parameters, and times in milliseconds, if measured.

    Tags begin with ``tdfx/`` for the whole model, and with ``tdfx_rank/``, ``tdfx_energy/`` and ``tdfx_ms/`` for its sites.

    Args:
        writer: Anything with ``add_scalar(tag, value, step)``.
        plan: A plan of ``tdfx.plan``, or ``Switch.plan``.
        step: Training steps taken so far.
        check: The result of ``plan.check``, if the whole step was timed.

    Raises:
        PolicyError: The writer has no ``add_scalar``. Nothing was logged then.

    Example:
        >>> import tdfx, tdfx.report, torch
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(f"{step} {tag} {value:g}") if "rank" in tag else None
        >>> plan = tdfx.plan(torch.nn.Linear(64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> tdfx.report.log_plan(Printer(), plan, step=7)
        7 tdfx_rank/root 16
    """
    check_writer(writer)
    for tag, value in chain(_model_scalars(plan, check), *map(_site_scalars, plan)):
        writer.add_scalar(tag, value, step)


def check_writer(writer: object) -> None:
    """Raise PolicyError unless an object takes scalars."""
    if not callable(getattr(writer, "add_scalar", None)):
        text = f"writer={writer!r} has no add_scalar(tag, value, step). Pass torch.utils.tensorboard.SummaryWriter(), or any"
        raise PolicyError(f"{text} object with that method.")


def _model_scalars(plan: Plan, check: StepTimes | None) -> Iterator[tuple[str, float]]:
    yield "tdfx/sites_factorized", len(plan.factorized)
    yield "tdfx/parameters", plan.parameters_after
    yield "tdfx/parameters_share", plan.parameters_after / max(1, plan.parameters_before)
    yield "tdfx/total_error", plan.total_error
    yield from _measured("tdfx/flops_forward", plan.flops_after)
    yield from _measured("tdfx/step_ms_dense", plan.step_seconds, 1e3)
    yield from _measured("tdfx/step_ms_predicted", plan.step_seconds_after, 1e3)
    if check is not None:
        yield "tdfx/step_ms_dense_checked", 1e3 * check.seconds_before
        yield "tdfx/step_ms_checked", 1e3 * check.seconds_after
        yield "tdfx/step_ms_predicted_checked", 1e3 * check.seconds_predicted


def _site_scalars(site: SitePlan) -> Iterator[tuple[str, float]]:
    name = site.name or "root"
    ranks = site.ranks or ()
    # Two ranks are those of the channels of the output and of the input.
    for mode, rank in zip(("/out", "/in") if len(ranks) == 2 else ("",) * len(ranks), ranks, strict=True):
        yield f"tdfx_rank/{name}{mode}", rank
    if site.factorized and site.error is not None:
        # A split by orthonormal bases loses exactly the energy that it does not keep.
        yield f"tdfx_energy/{name}", max(0.0, 1.0 - site.error**2)
    if not site.estimated:
        yield from _measured(f"tdfx_ms/{name}/dense", site.seconds_before, 1e3)
    if site.factorized and not site.estimated:
        yield from _measured(f"tdfx_ms/{name}/factorized", site.seconds_after, 1e3)


def _measured(tag: str, value: float | None, scale: float = 1.0) -> Iterator[tuple[str, float]]:
    if value is not None:
        yield tag, scale * value

"""A plan as a table that a person can read."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tdfx.plan import Plan, SitePlan

_PLAIN_WIDTH = 200


def render_plan(plan: Plan) -> str:
    """Return the plan's table as plain text."""
    return render_plain(plan_view(plan))


def render_plain(view: Group) -> str:
    """Return a view as plain text, wide enough that nothing is cut, without blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=_PLAIN_WIDTH, color_system=None, legacy_windows=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def plan_view(plan: Plan) -> Group:
    """Return the table, its totals and its notes, for a rich console."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("site", no_wrap=True)
    table.add_column("layer", no_wrap=True)
    table.add_column("scheme", no_wrap=True)
    table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("params", justify="right", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    timed = any(site.seconds_before is not None for site in plan.sites)
    if timed:
        table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("why")
    for site in plan.sites:
        # As Text, because a name may hold what rich reads as markup.
        table.add_row(*map(Text, _row(site, timed)), style=None if site.factorized else "dim")
    return Group(table, Text(), *(Text(line) for line in _summary(plan)))


def _row(site: SitePlan, timed: bool) -> tuple[str, ...]:
    times = (_times(site.seconds_before, site.seconds_after),) if timed else ()
    shape = "×".join(map(str, site.shape)) or "?"
    why = site.note if site.factorized else ": ".join(filter(None, (str(site.reason), site.note)))
    return (
        site.name or "(root)",
        f"{site.kind} {shape}",
        site.scheme or "kept",
        "/".join(map(str, site.ranks)) if site.ranks else "",
        f"{site.error:.1%}" if site.error is not None else "",
        _before_after(site.parameters_before, site.parameters_after),
        _before_after(site.flops_before, site.flops_after),
        *times,
        f"{site.gain:.2f}x" if site.gain is not None else "",
        why,
    )


def _summary(plan: Plan) -> list[str]:
    kept = Counter(str(site.reason) for site in plan.kept)
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.most_common())
    lines = [
        f"{plan.model or 'model'}: {len(plan.factorized)} of {len(plan)} sites factorized"
        + (f"; kept: {reasons}" if reasons else ""),
        f"parameters {_before_after(plan.parameters_before, plan.parameters_after)}"
        + _share(plan.parameters_before, plan.parameters_after),
    ]
    if plan.flops_before is not None:
        lines.append(
            f"FLOPs of the sites, forward {_before_after(plan.flops_before, plan.flops_after)}"
            + _share(plan.flops_before, plan.flops_after)
        )
    if plan.memory_before is not None and plan.memory_before != plan.memory_after:
        lines.append(
            f"bytes of the sites in training {_before_after(plan.memory_before, plan.memory_after)}"
            + _share(plan.memory_before, plan.memory_after)
        )
    timed = [one for one in plan.sites if one.seconds_before is not None and one.seconds_after is not None]
    if timed:
        before, after = (sum(getattr(one, f"seconds_{when}") for one in timed) for when in ("before", "after"))
        lines.append(f"measured, {len(timed)} sites: {_times(before, after)} ms a step" + _faster(before, after))
    if plan.step_seconds is not None:
        lines.append(
            f"training step {_times(plan.step_seconds, plan.step_seconds_after)} ms"
            + _faster(plan.step_seconds, plan.step_seconds_after)
            + ", as predicted"
        )
    if plan.factorized and plan.total_error > 0:
        lines.append(f"total error {plan.total_error:.3g} (the squares of the sites' errors, summed)")
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def _before_after(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    return short_number(before) if before == after else f"{short_number(before)} → {short_number(after)}"


def _times(before: float | None, after: float | None) -> str:
    """Return times in milliseconds with three figures.

    >>> _times(0.01234, 0.005)
    '12.3 → 5'
    """
    if before is None or after is None:
        return ""
    return f"{1e3 * before:.3g}" if before == after else f"{1e3 * before:.3g} → {1e3 * after:.3g}"


def _faster(before: float, after: float | None) -> str:
    return f" ({before / after:.2f}x faster)" if after and after != before else ""


def _share(before: int | None, after: int | None) -> str:
    return f" ({after / before:.0%})" if before and after is not None and before != after else ""


def short_number(value: int) -> str:
    """Return a count with three figures and a letter for the thousands.

    >>> short_number(1234567)
    '1.23M'
    """
    size = float(value)
    for letter in ("", "k", "M", "G", "T"):
        if abs(size) < 999.5:
            return f"{size:.0f}" if not letter else f"{size:.3g}{letter}"
        size /= 1000
    return f"{size:.3g}P"

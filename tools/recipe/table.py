"""The paper's table, made of the rows that were run, and its place in the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import geometric_mean, mean, stdev

from rich.table import Table

from recipe.errors import RecipeError
from recipe.rows import FULL, Row

NEAR = 0.3
"""Points below the full run's accuracy at which a run counts as having reached it."""
BEGIN, END = "<!-- python tools/paper_table.py --readme -->\n", "\n<!-- end of the paper's table -->"
_HEADS = (
    "accuracy %",
    "loss",
    "run faster",
    "the first time",
    "to full's accuracy",
    "parameters",
    "FLOPs",
    "sites",
)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each network and data set."""
    names = dict.fromkeys(one.run for one in rows)
    return [table_of([one for one in rows if one.run == name]) for name in names]


def table_of(rows: Sequence[Row]) -> Table:
    """Return what each policy came to, over the seeds.

    "run faster" is how many times less the whole training took, planning, rewriting and merging included, with the times
    of layers known, and "the first time" with measuring them; each beside the full run of the same seed.
    """
    head = next((one.record for one in rows if one.record is not None), None)
    title = rows[0].run if head is None else f"{head.config['name']}, {head.config['training']['epochs']} epochs"
    table = Table(title, *_HEADS, box=None)
    full = {one.seed: one for one in rows if one.policy == FULL}
    for policy in dict.fromkeys(one.policy for one in rows):
        table.add_row(policy, *_cells([one for one in rows if one.policy == policy], full))
    return table


def _cells(own: Sequence[Row], full: dict[int, Row]) -> list[str]:
    done = [one.record for one in own if one.record is not None]
    if not done:
        return ["refused"]
    pairs = [(one, faster(one, full.get(one.seed))) for one in own]
    later = [value for one, value in pairs if value is not None and not one.cold]
    first = [value for one, value in pairs if value is not None and one.cold]
    reached = [ratio for one in own if (ratio := reaching(one, full.get(one.seed))) is not None]
    is_full = own[0].policy == FULL
    counts = sorted({len(one.factorized) for one in done})
    return [
        _spread([one.accuracy for one in done], 2),
        _spread([one.loss for one in done], 3),
        "1.00" if is_full else (f"{geometric_mean(later):.2f}" if later else "-"),
        "" if is_full else (f"{geometric_mean(first):.2f}" if first else "-"),
        f"{geometric_mean(reached):.2f} ({len(reached)}/{len(done)})" if reached else f"never (0/{len(done)})",
        _share([(one.parameters_after, one.parameters) for one in done]),
        _share([(one.flops_after or 0, one.flops or 0) for one in done]),
        ""
        if is_full
        else f"{'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}/{max(one.sites for one in done)}",
    ]


def faster(row: Row, full: Row | None) -> float | None:
    """Return how many times less the training of a row took than the full run of its seed."""
    if row.record is None or full is None or full.record is None:
        return None
    return full.record.total / row.record.total


def reaching(row: Row, full: Row | None) -> float | None:
    """Return how many times sooner a row came near to the full run's last accuracy than that run; None if it never did."""
    if full is None or full.record is None or row.record is None:
        return None
    target = full.record.epochs[-1]["accuracy"] - NEAR
    times = [
        next((epoch["seconds"] for epoch in one.epochs if epoch["accuracy"] >= target), None)
        for one in (full.record, row.record)
    ]
    return times[0] / times[1] if times[0] and times[1] else None


def _share(pairs: Sequence[tuple[int, int]]) -> str:
    return f"{100 * mean(after / before for after, before in pairs):.0f} %" if all(one[1] for one in pairs) else "100 %"


def _spread(values: Sequence[float], digits: int) -> str:
    apart = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{apart}"


def with_block(readme: str, text: str) -> str:
    """Return the README with the table in its place.

    Raises:
        RecipeError: The README has no place for it.
    """
    found = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not found.search(readme):
        raise RecipeError(
            f"The README has no place for the table. Put these two lines in: {BEGIN.strip()} {END.strip()}"
        )
    return found.sub(lambda _: f"{BEGIN}```\n{text}\n```{END}", readme)

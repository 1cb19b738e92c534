"""The paper's table, from the rows that were run, and its place in the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import geometric_mean, mean

from bench_common import make_table, mean_and_deviation
from rich.table import Table

from recipe.errors import RecipeError
from recipe.record import RunRecord
from recipe.rows import FULL, PaperRow

NEAR = 0.3
"""A run has reached the full run's accuracy if it is at most this many points below."""
BEGIN, END = "<!-- python tools/paper_table.py --readme -->\n", "\n<!-- end of the paper's table -->"


def tables(rows: Sequence[PaperRow]) -> list[Table]:
    """Return a table for each network and data set."""
    names = dict.fromkeys(row.run for row in rows)
    return [table_of([row for row in rows if row.run == name]) for name in names]


def table_of(rows: Sequence[PaperRow]) -> Table:
    """Return the results of each policy over the seeds, as tools/README.md explains them."""
    first = next((row.record for row in rows if row.record is not None), None)
    title = rows[0].run if first is None else f"{first.config['name']}, {first.config['training']['epochs']} epochs"
    full = {row.seed: row for row in rows if row.policy == FULL}
    by_policy = {
        name: [row for row in rows if row.policy == name] for name in dict.fromkeys(row.policy for row in rows)
    }
    return make_table({title: policy, **_cells(policy_rows, full)} for policy, policy_rows in by_policy.items())


def _cells(rows: Sequence[PaperRow], full: dict[int, PaperRow]) -> dict[str, str]:
    records = [row.record for row in rows if row.record is not None]
    if not records:
        return {"accuracy %": "refused"}
    is_full = rows[0].policy == FULL
    speeds = [(row.cold, speed) for row in rows if (speed := faster(row, full.get(row.seed))) is not None]
    later, first = ([speed for cold, speed in speeds if cold == wanted] for wanted in (False, True))
    reached = [ratio for row in rows if (ratio := reaching(row, full.get(row.seed))) is not None]
    sooner = f"{geometric_mean(reached):.2f}" if reached else "never"
    return {
        "accuracy %": mean_and_deviation([record.accuracy for record in records], 2),
        "loss": mean_and_deviation([record.loss for record in records], 3),
        "run faster": "1.00" if is_full else (f"{geometric_mean(later):.2f}" if later else "-"),
        "the first time": "" if is_full else (f"{geometric_mean(first):.2f}" if first else "-"),
        "to full's accuracy": f"{sooner} ({len(reached)}/{len(records)})",
        "parameters": _percent([(record.parameters_after, record.parameters) for record in records]),
        "FLOPs": _percent([(record.flops_after or 0, record.flops or 0) for record in records]),
        "sites": "" if is_full else _sites(records),
    }


def faster(row: PaperRow, full: PaperRow | None) -> float | None:
    """Return how many times less the training of a row took than the full run of its seed."""
    if row.record is None or full is None or full.record is None:
        return None
    return full.record.total / row.record.total


def reaching(row: PaperRow, full: PaperRow | None) -> float | None:
    """Return how many times sooner than the full run a row came near that run's last accuracy; None if it never did."""
    if full is None or full.record is None or row.record is None:
        return None
    target = full.record.epochs[-1]["accuracy"] - NEAR
    full_time, time = (
        next((epoch["seconds"] for epoch in record.epochs if epoch["accuracy"] >= target), None)
        for record in (full.record, row.record)
    )
    return full_time / time if full_time and time else None


def _percent(pairs: Sequence[tuple[int, int]]) -> str:
    """Return the mean ratio of (after, before) in percent; 100 % where there is no value."""
    if not all(before for _, before in pairs):
        return "100 %"
    return f"{100 * mean(after / before for after, before in pairs):.0f} %"


def _sites(records: Sequence[RunRecord]) -> str:
    """Return the range of the numbers of factorized sites, and the number of all sites: "3-5/7"."""
    counts = [len(record.factorized) for record in records]
    ends = dict.fromkeys((min(counts), max(counts)))
    return f"{'-'.join(map(str, ends))}/{max(record.sites for record in records)}"


def with_block(readme: str, text: str) -> str:
    """Return the README with the table in its place; RecipeError if it has none."""
    block = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not block.search(readme):
        lines = f"{BEGIN.strip()} {END.strip()}"
        raise RecipeError(f"The README has no place for the table. Insert these two lines: {lines}")
    return block.sub(lambda _: f"{BEGIN}```\n{text}\n```{END}", readme)

"""The paper's table, from the rows that were run, and its place in the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import geometric_mean, mean

from bench_common import mean_and_deviation
from rich.table import Table

from recipe.errors import RecipeError
from recipe.record import RunRecord
from recipe.rows import FULL, PaperRow

NEAR = 0.3
"""A run has reached the full run's accuracy if it is at most this many points below."""
BEGIN, END = "<!-- python tools/paper_table.py --readme -->\n", "\n<!-- end of the paper's table -->"
_HEADS = ("accuracy %", "loss", "run faster", "the first time", "to full's accuracy", "parameters", "FLOPs", "sites")


def tables(rows: Sequence[PaperRow]) -> list[Table]:
    """Return a table for each network and data set."""
    names = dict.fromkeys(row.run for row in rows)
    return [table_of([row for row in rows if row.run == name]) for name in names]


def table_of(rows: Sequence[PaperRow]) -> Table:
    """Return the results of each policy over the seeds.

    "run faster" is how many times less the whole training took than the full run of the same seed, planning, rewriting and
    merging included, with the times of layers in the cache; "the first time" includes measuring them.
    """
    first = next((row.record for row in rows if row.record is not None), None)
    title = rows[0].run if first is None else f"{first.config['name']}, {first.config['training']['epochs']} epochs"
    table = Table(title, *_HEADS, box=None)
    full = {row.seed: row for row in rows if row.policy == FULL}
    for policy in dict.fromkeys(row.policy for row in rows):
        table.add_row(policy, *_cells([row for row in rows if row.policy == policy], full))
    return table


def _cells(rows: Sequence[PaperRow], full: dict[int, PaperRow]) -> list[str]:
    """Return the cells of the rows of one policy."""
    records = [row.record for row in rows if row.record is not None]
    if not records:
        return ["refused"]
    is_full = rows[0].policy == FULL
    speeds = [(row.cold, speed) for row in rows if (speed := faster(row, full.get(row.seed))) is not None]
    later, first = ([speed for cold, speed in speeds if cold == wanted] for wanted in (False, True))
    reached = [ratio for row in rows if (ratio := reaching(row, full.get(row.seed))) is not None]
    return [
        mean_and_deviation([record.accuracy for record in records], 2),
        mean_and_deviation([record.loss for record in records], 3),
        "1.00" if is_full else (f"{geometric_mean(later):.2f}" if later else "-"),
        "" if is_full else (f"{geometric_mean(first):.2f}" if first else "-"),
        f"{geometric_mean(reached):.2f} ({len(reached)}/{len(records)})" if reached else f"never (0/{len(records)})",
        _percent([(record.parameters_after, record.parameters) for record in records]),
        _percent([(record.flops_after or 0, record.flops or 0) for record in records]),
        "" if is_full else _sites(records),
    ]


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
    """Return the README with the table in its place.

    Raises:
        RecipeError: The README has no place for it.
    """
    block = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not block.search(readme):
        raise RecipeError(
            f"The README has no place for the table. Insert these two lines: {BEGIN.strip()} {END.strip()}"
        )
    return block.sub(lambda _: f"{BEGIN}```\n{text}\n```{END}", readme)

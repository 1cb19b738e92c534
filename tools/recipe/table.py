"""The paper's table, from the rows that were run, and its place in the README."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import geometric_mean, mean, stdev

from bench_common import make_table, mean_and_deviation
from rich.table import Table

from recipe.errors import RecipeError
from recipe.record import RunRecord
from recipe.rows import CONTROL, FULL, PaperRow

DENSE = (FULL, CONTROL)
"""The rows that are not factorized."""
BEGIN, END = "<!-- python tools/paper_table.py --readme -->\n", "\n<!-- end of the paper's table -->"
LONGER = 1.05
"""A row that took more than this many times the control's time is not compared with it."""


def tables(rows: Sequence[PaperRow]) -> list[Table]:
    """Return a table for each network and data set, and a summary of all of them for each policy."""
    names = dict.fromkeys(row.run for row in rows)
    policies = [name for name in dict.fromkeys(row.policy for row in rows) if name not in DENSE]
    return [*(table_of(_rows_of(rows, name)) for name in names), *(summary(rows, policy) for policy in policies)]


def table_of(rows: Sequence[PaperRow]) -> Table:
    """Return the results of each policy over the seeds, as tools/README.md explains them."""
    title = _title(rows)
    return make_table({title: policy, **_cells(rows, policy)} for policy in dict.fromkeys(row.policy for row in rows))


def summary(rows: Sequence[PaperRow], policy: str) -> Table:
    """Return a policy's results on each network and data set, and on all of them: means, and the worst seed."""
    names = dict.fromkeys(row.run for row in rows if row.policy == policy and row.record is not None)
    groups = {_title(rows_of_name): rows_of_name for rows_of_name in (_rows_of(rows, name) for name in names)}
    lines = [{policy: title, **_summary_cells(group, policy)} for title, group in groups.items()]
    if len(lines) > 1:
        verdicts = [line["clearly"] for line in lines]
        every = [row for group in groups.values() for row in group]
        compared = len(verdicts) - verdicts.count("-")
        count = f"{verdicts.count('yes')} of {compared}" if compared else "-"
        lines.append({policy: "all", **_summary_cells(every, policy), "clearly": count})
    return make_table(lines)


def _rows_of(rows: Sequence[PaperRow], name: str) -> list[PaperRow]:
    return [row for row in rows if row.run == name]


def _title(rows: Sequence[PaperRow]) -> str:
    first = next((row.record for row in rows if row.record is not None), None)
    return rows[0].run if first is None else f"{first.config['name']}, {first.config['training']['epochs']} epochs"


def _cells(rows: Sequence[PaperRow], policy: str) -> dict[str, str]:
    records = [row.record for row in rows if row.policy == policy and row.record is not None]
    if not records:
        return {"accuracy %": "refused"}
    return {
        "accuracy %": mean_and_deviation([record.accuracy for record in records], 2),
        "loss": mean_and_deviation([record.loss for record in records], 3),
        **_speed_cells(rows, policy),
        **_control_cells(rows, policy),
        "parameters": _percent([(record.parameters_after, record.parameters) for record in records]),
        "FLOPs": _percent([(record.flops_after or 0, record.flops or 0) for record in records]),
        "sites": "" if policy in DENSE else _sites(records),
    }


def _summary_cells(rows: Sequence[PaperRow], policy: str) -> dict[str, str]:
    pairs = pairs_of(rows, policy, FULL)
    cells = _speed_cells(rows, policy)
    if pairs:
        lost = accuracies_above(pairs)
        cells["to full, points"] = f"{mean(lost):+.2f}"
        cells["worst seed"] = f"{min(lost):+.2f}"
        cells["nats"] = f"{mean(row.loss - full.loss for row, full in pairs):+.3f}"
    return {**cells, **_control_cells(rows, policy)}


def pairs_of(rows: Sequence[PaperRow], policy: str, other: str) -> list[tuple[RunRecord, RunRecord]]:
    """Return the records of two policies that were run on the same network and data set with the same seed."""
    others = {(row.run, row.seed): row.record for row in rows if row.policy == other}
    chosen = (row for row in rows if row.policy == policy)
    pairs = ((row.record, others.get((row.run, row.seed))) for row in chosen)
    return [(record, beside) for record, beside in pairs if record is not None and beside is not None]


def accuracies_above(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> list[float]:
    """Return by how many points each first run is more accurate than the second."""
    return [record.accuracy - beside.accuracy for record, beside in pairs]


def speeds(rows: Sequence[PaperRow], policy: str) -> list[float]:
    """Return how many times less each training of a policy took than the full one of its seed."""
    return [full.total / record.total for record, full in pairs_of(rows, policy, FULL)]


def _speed_cells(rows: Sequence[PaperRow], policy: str) -> dict[str, str]:
    """Return the cells for runs with known layer times, and for those that had to measure them first."""
    later, first = (
        speeds([row for row in rows if row.policy == FULL or row.cold == wanted], policy) for wanted in (False, True)
    )
    if policy == FULL:
        return {"run faster": "1.00", "the first time": ""}
    missing = "" if policy in DENSE else "-"
    return {
        "run faster": f"{geometric_mean(later):.2f}" if later else "-",
        "the first time": f"{geometric_mean(first):.2f}" if first else missing,
    }


def _control_cells(rows: Sequence[PaperRow], policy: str) -> dict[str, str]:
    """Return the cells that compare a policy's accuracy with that of the dense runs shortened to the same time."""
    pairs = [] if policy in DENSE else pairs_of(rows, policy, CONTROL)
    if not pairs:
        missing = "" if policy in DENSE else "-"
        return {"to control, points": missing, "clearly": missing}
    above = accuracies_above(pairs)
    return {
        "to control, points": ("+" if mean(above) >= 0 else "") + mean_and_deviation(above, 2),
        "clearly": _verdict(pairs),
    }


def _verdict(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> str:
    """Return "yes" if the mean difference to the control is above the standard deviation of the seeds' differences."""
    if mean(record.total for record, _ in pairs) > LONGER * mean(control.total for _, control in pairs):
        return "took longer"
    above = accuracies_above(pairs)
    if len(above) == 1:
        return "one seed"
    return "yes" if mean(above) > stdev(above) else "no"


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

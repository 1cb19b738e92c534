"""Print a plan as a table that fits the width of the terminal, with its totals below."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tdfx.plans.decisions import Decisions, SitePlan
from tdfx.text import before_after, milliseconds, share, times_faster

_UNBOUNDED = 100_000
"""Characters in a line of plain text, which is never shortened."""
_GAP = 2
_LEAST_NAME = 16
"""Names are folded to this width, or three tenths of the line, before columns go; to more where they would be equal."""
_LEAST_NOTE = 16


@dataclass(frozen=True, slots=True)
class _TableColumn:
    """One column: its title, its text for a site, and whether it is aligned to the right."""

    title: str
    text: Callable[[SitePlan], str]
    right: bool = False


def _shape(site: SitePlan) -> str:
    return "×".join(map(str, site.shape)) or "?"


def _approximate(site: SitePlan) -> str:
    """Return the mark of a gain that is modelled among others that were measured."""
    return "~" if site.gain is not None and site.seconds_after is None else ""


_NAME = _TableColumn("site", lambda site: site.name or "(root)")
_LAYER = _TableColumn("layer", lambda site: f"{site.kind} {_shape(site)}")
_SHAPE = _TableColumn("shape", _shape)
_SCHEME = _TableColumn(
    "scheme",
    lambda site: f"{site.scheme}{', recomputed' if site.recompute else ''}" if site.scheme else str(site.reason),
)
_RANKS = _TableColumn("ranks", lambda site: "/".join(map(str, site.ranks or ())), right=True)
_ERROR = _TableColumn("error", lambda site: f"{site.error:.1%}" if site.error is not None else "", right=True)
_PARAMETERS = _TableColumn("params", lambda site: before_after(site.parameters_before, site.parameters_after), True)
_PARAMETERS_LEFT = _TableColumn("params", lambda site: share(site.parameters_before, site.parameters_after), right=True)
_FLOPS = _TableColumn("FLOPs", lambda site: before_after(site.flops_before, site.flops_after), right=True)
_FLOPS_LEFT = _TableColumn("FLOPs", lambda site: share(site.flops_before, site.flops_after), right=True)
_ACTIVATIONS = _TableColumn(
    "activations", lambda site: before_after(site.activations_before, site.activations_after), right=True
)
_MILLISECONDS = _TableColumn(
    "ms", lambda site: milliseconds(site.seconds_before, site.seconds_after, estimated=site.estimated), right=True
)
_MODELLED = _TableColumn("modelled", lambda site: f"{site.gain:.2f}x" if site.gain is not None else "", right=True)
"""The gain where nothing was timed: it counts operations and memory traffic."""
_GAIN = _TableColumn("gain", lambda site: _approximate(site) + _MODELLED.text(site), right=True)
_NOTE = _TableColumn("note", lambda site: site.note)

_WIDE = (_NAME, _LAYER, _SCHEME, _RANKS, _ERROR, _PARAMETERS, _FLOPS, _ACTIVATIONS, _MILLISECONDS, _GAIN)
_SHORTER = {_FLOPS: _FLOPS_LEFT, _PARAMETERS: _PARAMETERS_LEFT, _LAYER: _SHAPE}
_CUTS = (_ACTIVATIONS, *_SHORTER, _FLOPS_LEFT, _SHAPE, _MILLISECONDS, _ERROR, _RANKS, _PARAMETERS_LEFT)
"""Columns to replace by shorter ones, or else to leave out, where the line is too short, the least important first."""


def render_plain(view: Group) -> str:
    """Return a view as plain text of any width, without blanks at the ends of lines."""
    text = io.StringIO()
    Console(file=text, width=_UNBOUNDED, color_system=None, legacy_windows=False).print(view)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def plan_view(plan: Decisions, width: int | None = None, sites: Sequence[SitePlan] | None = None) -> Group:
    """Return the table, its totals and its notes, for a rich console.

    Args:
        plan: The plan to show.
        width: Characters in a line, or None for no limit; to fit, columns are shortened and left out, and names folded.
        sites: The rows, where only some sites of the plan are shown; the totals are always those of the plan.
    """
    rows = plan.sites if sites is None else sites
    parts: list[RenderableType] = [_table(rows, width)] if rows else []
    if len(rows) < len(plan):
        parts.append(Text(f"shown: {len(rows)} of {len(plan)} sites; the totals are those of all sites", style="dim"))
    first, *others = totals(plan)
    notes = (Text(f"note: {note}", style="dim") for note in plan.notes)
    return Group(*parts, Text(), Text(first, style="bold"), *map(Text, others), *notes)


def _table(rows: Sequence[SitePlan], width: int | None) -> Table:
    columns, name_width, note_width = _fit(rows, width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for site in rows:
        cells = [_cell(column, site) for column in columns]
        cells[0].plain = fold(cells[0].plain, name_width)
        if columns[-1] is _NOTE:
            cells[-1].truncate(note_width, overflow="ellipsis")
        table.add_row(*cells, style=None if site.factorized else "dim")
    return table


def _cell(column: _TableColumn, site: SitePlan) -> Text:
    """Return a cell as Text, because a name may hold text that rich reads as markup."""
    styles = {_SCHEME: "cyan", _GAIN: "green", _MODELLED: "green"} if site.factorized else {_SCHEME: "yellow"}
    style = "dim" if column is _NOTE else styles.get(column, "")
    # A line break or a colour code in a name would break the table.
    return Text("".join(letter if letter.isprintable() else "�" for letter in column.text(site)), style=style)


def _fit(rows: Sequence[SitePlan], width: int | None) -> tuple[list[_TableColumn], int, int]:
    """Return the columns that fit, and the widths of the names and of the notes."""
    wide = _WIDE if _has_text(_MILLISECONDS, rows) else (*_WIDE[:-1], _MODELLED)
    widths = {
        column: max(map(cell_len, (column.title, *map(column.text, rows))))
        for column in (*wide, *_SHORTER.values(), _NOTE)
    }
    columns = [column for column in wide if column is _NAME or _has_text(column, rows)]
    has_notes = _has_text(_NOTE, rows)
    if width is None:
        return [*columns, *([_NOTE] if has_notes else [])], _UNBOUNDED, _UNBOUNDED

    def room() -> int:
        """Return the width that is left for the names."""
        return width - sum(widths[column] + _GAP for column in columns if column is not _NAME)

    short = max(_LEAST_NAME, width * 3 // 10)
    least = min(_least_width([_NAME.text(site) for site in rows], short, max(short, width // 2)), widths[_NAME])
    for cut in _CUTS:
        shorter = _SHORTER.get(cut)
        # The first column goes, and others are shortened, to make room for whole names; others are left out only to make
        # room for folded ones.
        if cut in columns and room() < (widths[_NAME] if shorter is not None or cut is _ACTIVATIONS else least):
            place = columns.index(cut)
            columns[place : place + 1] = [shorter] if shorter is not None and _has_text(shorter, rows) else []
    name_width = min(widths[_NAME], max(room(), 2))
    note_width = room() - name_width - _GAP
    if has_notes and note_width >= min(_LEAST_NOTE, widths[_NOTE]):
        columns.append(_NOTE)
    return columns, name_width, note_width


def _has_text(column: _TableColumn, rows: Sequence[SitePlan]) -> bool:
    return any(map(column.text, rows))


def _least_width(names: Sequence[str], least: int, most: int) -> int:
    """Return the smallest width in [least, most] at which folded names still differ, or ``most``."""
    widths = range(least, most + 1)
    return next((width for width in widths if len({fold(name, width) for name in names}) == len(set(names))), most)


def fold(name: str, width: int) -> str:
    """Return a name that fits into a width: letters in its middle are left out, but not numbers, which identify blocks.

    >>> fold("encoder.layers.encoder_layer_11.mlp.0", 28)
    'encoder…coder_layer_11.mlp.0'
    >>> fold("encoder.layers.encoder_layer_11.self_attention.out_proj", 28)
    'encoder…11…ttention.out_proj'
    >>> fold("layer3.0.downsample.0", 19)
    'layer3.0…wnsample.0'
    """
    if cell_len(name) <= width:
        return name
    first, _, rest = name.partition(".")
    inner, _, last = rest.rpartition(".")
    middle = f".{inner}." if inner else ""
    runs = groupby(range(len(middle)), lambda place: middle[place].isdigit())
    words = [list(run) for is_number, run in runs if not is_number]
    removable = [place for word in sorted(words, key=len, reverse=True) for place in word]
    shorter = name
    for count in range(1, len(removable) + 1):
        removed = set(removable[:count])
        letters = (None if place in removed else letter for place, letter in enumerate(middle))
        shorter = f"{first}{_with_gaps(letters)}{last}"
        if cell_len(shorter) <= width:
            return shorter
    head = max((width - 1) // 3, 0)
    return f"{shorter[:head]}…{shorter[len(shorter) - (width - 1 - head) :]}" if width > 1 else "…"


def _with_gaps(letters: Iterable[str | None]) -> str:
    """Return text with an ellipsis for each run of removed letters."""
    runs = groupby(letters, lambda letter: letter is None)
    return "".join("…" if is_gap else "".join(map(str, run)) for is_gap, run in runs)


def totals(plan: Decisions) -> list[str]:
    """Return a line for each total that is known, over all sites of the plan."""
    kept = Counter(str(site.reason) for site in plan.kept)
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.most_common())
    lines = [f"{plan.model or 'model'}: {len(plan.factorized)} of {len(plan)} sites factorized"]
    lines[0] += f"; kept: {reasons}" if reasons else ""
    counts = {
        "parameters": (plan.parameters_before, plan.parameters_after),
        "FLOPs of the sites, forward": (plan.flops_before, plan.flops_after),
    }
    if plan.memory_before != plan.memory_after:
        counts["bytes of the sites in training"] = plan.memory_before, plan.memory_after
    if plan.activations_before != plan.activations_after or any(site.recompute for site in plan.factorized):
        counts["bytes that the sites keep for the backward pass"] = plan.activations_before, plan.activations_after
    for name, (now, then) in counts.items():
        if now is not None:
            lines.append(f"{name} {before_after(now, then)}{_in_brackets(share(now, then))}")
    timed = [site for site in plan.sites if site.seconds_before is not None and site.seconds_after is not None]
    if timed:
        before, after = (sum(getattr(site, f"seconds_{when}") for site in timed) for when in ("before", "after"))
        count = sum(site.estimated for site in timed)
        how = "estimated" if count == len(timed) else "measured"
        sites = f"{len(timed)} sites" + (f", {count} of them by estimate" if count and how == "measured" else "")
        faster = _in_brackets(times_faster(before, after))
        lines.append(f"{how}, {sites}: {milliseconds(before, after)} ms a step{faster}")
    if plan.step_seconds is not None:
        lines.append(
            f"training step: measured {milliseconds(plan.step_seconds, plan.step_seconds)} ms now{_predicted(plan)}"
        )
    if plan.factorized and plan.total_error > 0:
        lines.append(f"total error {plan.total_error:.3g} (the sites' squared errors, summed{_in_metric(plan)})")
    return lines


def _predicted(plan: Decisions) -> str:
    """Return how long the step is predicted to take after the rewrite; "" where it stays as it is."""
    before, after = plan.step_seconds, plan.step_seconds_after
    if before is None or after is None or before == after:
        return ""
    within = f", within {plan.uncertainty:.0%}" if plan.uncertainty else ""
    return f", predicted {milliseconds(after, after)} ms after the rewrite ({times_faster(before, after)}{within})"


def _in_metric(plan: Decisions) -> str:
    """Return what the errors of the factorized sites are measured in."""
    words = {
        "weights": "of the weights",
        "inputs": "of what the weights do to their inputs",
        "loss": "in the metric of the loss",
    }
    names = list(dict.fromkeys(site.metric for site in plan.factorized))
    return f"; errors {', '.join(words[name] for name in names)}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""

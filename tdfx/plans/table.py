"""Print a plan as a table that fits the width of the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tdfx.plans.decisions import Decisions
from tdfx.plans.site import SitePlan
from tdfx.plans.totals import totals
from tdfx.text import before_after, milliseconds, share

_UNBOUNDED = 100_000
"""Characters in a line of plain text, which is never shortened."""
_GAP = 2
_LEAST_NAME = 16
"""Names are folded to this width, or three tenths of the line, before columns are left out; they stay wider where folded
names would be equal."""
_LEAST_NOTE = 16


@dataclass(frozen=True, slots=True)
class _TableColumn:
    """One column: its title, its text for a site, and whether it is aligned to the right."""

    title: str
    text: Callable[[SitePlan], str]
    right: bool = False


def _kind_and_shape(site: SitePlan) -> str:
    return f"{site.kind} {_shape(site)}"


def _shape(site: SitePlan) -> str:
    return "×".join(map(str, site.shape)) or "?"


def _milliseconds(site: SitePlan) -> str:
    return milliseconds(site.seconds_before, site.seconds_after, estimated=site.estimated)


_NAME = _TableColumn("site", lambda site: site.name or "(root)")
_LAYER = _TableColumn("layer", _kind_and_shape)
_SHAPE = _TableColumn("shape", _shape)
_SCHEME = _TableColumn("scheme", lambda site: site.scheme or str(site.reason))
_RANKS = _TableColumn("ranks", lambda site: "/".join(map(str, site.ranks or ())), right=True)
_ERROR = _TableColumn("error", lambda site: f"{site.error:.1%}" if site.error is not None else "", right=True)
_PARAMETERS = _TableColumn(
    "params", lambda site: before_after(site.parameters_before, site.parameters_after), right=True
)
_PARAMETERS_LEFT = _TableColumn("params", lambda site: share(site.parameters_before, site.parameters_after), right=True)
_FLOPS = _TableColumn("FLOPs", lambda site: before_after(site.flops_before, site.flops_after), right=True)
_FLOPS_LEFT = _TableColumn("FLOPs", lambda site: share(site.flops_before, site.flops_after), right=True)
_MILLISECONDS = _TableColumn("ms", _milliseconds, right=True)
_GAIN = _TableColumn("gain", lambda site: f"{site.gain:.2f}x" if site.gain is not None else "", right=True)
_NOTE = _TableColumn("note", lambda site: site.note)

_WIDE = (_NAME, _LAYER, _SCHEME, _RANKS, _ERROR, _PARAMETERS, _FLOPS, _MILLISECONDS, _GAIN)
_CUTS: tuple[tuple[_TableColumn, _TableColumn | None], ...] = (
    (_FLOPS, _FLOPS_LEFT),
    (_PARAMETERS, _PARAMETERS_LEFT),
    (_LAYER, _SHAPE),
    (_FLOPS_LEFT, None),
    (_SHAPE, None),
    (_MILLISECONDS, None),
    (_ERROR, None),
    (_RANKS, None),
    (_PARAMETERS_LEFT, None),
)
"""Columns to shorten or to leave out where the line is too short, the least important first."""


def render_plan(plan: Decisions) -> str:
    """Return the plan's table as plain text."""
    return render_plain(plan_view(plan))


def render_plain(view: Group) -> str:
    """Return a view as plain text of any width, without blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=_UNBOUNDED, color_system=None, legacy_windows=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def plan_view(plan: Decisions, width: int | None = None, sites: Sequence[SitePlan] | None = None) -> Group:
    """Return the table, its totals and its notes, for a rich console.

    Args:
        plan: The plan to show.
        width: Characters in a line; unlimited if left out. In a narrow line, columns are shortened and then left out, and
            long names are folded in the middle.
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
    styles = {_SCHEME: "cyan", _GAIN: "green"} if site.factorized else {_SCHEME: "yellow"}
    style = "dim" if column is _NOTE else styles.get(column, "")
    # A line break or a colour code in a name would break the table.
    return Text("".join(letter if letter.isprintable() else "�" for letter in column.text(site)), style=style)


def _fit(rows: Sequence[SitePlan], width: int | None) -> tuple[list[_TableColumn], int, int]:
    """Return the columns that fit, and the widths of the names and of the notes."""
    widths = {column: _width(column, rows) for column in (*_WIDE, *(new for _, new in _CUTS if new), _NOTE)}
    columns = [column for column in _WIDE if column is _NAME or _has_text(column, rows)]
    has_notes = _has_text(_NOTE, rows)
    if width is None:
        return [*columns, *([_NOTE] if has_notes else [])], _UNBOUNDED, _UNBOUNDED

    def room() -> int:
        """Return the width that is left for the names."""
        return width - sum(widths[column] + _GAP for column in columns if column is not _NAME)

    short = max(_LEAST_NAME, width * 3 // 10)
    least = min(_least_width([_NAME.text(site) for site in rows], short, max(short, width // 2)), widths[_NAME])
    for cut, shorter in _CUTS:
        # A column is shortened to make room for whole names, but left out only to make room for folded ones.
        if room() >= (widths[_NAME] if shorter is not None else least):
            continue
        if cut in columns:
            place = columns.index(cut)
            columns[place : place + 1] = [shorter] if shorter is not None and _has_text(shorter, rows) else []
    name_width = min(widths[_NAME], max(room(), 2))
    note_width = room() - name_width - _GAP
    if has_notes and note_width >= min(_LEAST_NOTE, widths[_NOTE]):
        columns.append(_NOTE)
    return columns, name_width, note_width


def _has_text(column: _TableColumn, rows: Sequence[SitePlan]) -> bool:
    return any(column.text(site) for site in rows)


def _width(column: _TableColumn, rows: Sequence[SitePlan]) -> int:
    return max(cell_len(column.title), *(cell_len(column.text(site)) for site in rows))


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

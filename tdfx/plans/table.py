"""A plan as a table that a person can read, as wide as there is room for."""

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
"""Columns of a plain text, which nothing cuts."""
_GAP = 2
_LEAST_NAME = 16
"""Columns to which names are folded before anything else is left out: these, or three tenths of the width, and a few more
where names would not differ."""
_LEAST_NOTE = 16


@dataclass(frozen=True, slots=True)
class _Column:
    """One column: its title, what it says of a site, and how it looks."""

    title: str
    text: Callable[[SitePlan], str]
    right: bool = False


def _kind_and_shape(site: SitePlan) -> str:
    return f"{site.kind} {_shape(site)}"


def _shape(site: SitePlan) -> str:
    return "×".join(map(str, site.shape)) or "?"


def _milliseconds(site: SitePlan) -> str:
    return milliseconds(site.seconds_before, site.seconds_after, estimated=site.estimated)


_NAME = _Column("site", lambda site: site.name or "(root)")
_LAYER = _Column("layer", _kind_and_shape)
_SHAPE = _Column("shape", _shape)
_SCHEME = _Column("scheme", lambda site: site.scheme or str(site.reason))
_RANKS = _Column("ranks", lambda site: "/".join(map(str, site.ranks or ())), right=True)
_ERROR = _Column("error", lambda site: f"{site.error:.1%}" if site.error is not None else "", right=True)
_PARAMETERS = _Column("params", lambda site: before_after(site.parameters_before, site.parameters_after), right=True)
_PARAMETERS_LEFT = _Column("params", lambda site: share(site.parameters_before, site.parameters_after), right=True)
_FLOPS = _Column("FLOPs", lambda site: before_after(site.flops_before, site.flops_after), right=True)
_FLOPS_LEFT = _Column("FLOPs", lambda site: share(site.flops_before, site.flops_after), right=True)
_MILLISECONDS = _Column("ms", _milliseconds, right=True)
_GAIN = _Column("gain", lambda site: f"{site.gain:.2f}x" if site.gain is not None else "", right=True)
_NOTE = _Column("note", lambda site: site.note)

_WIDE = (_NAME, _LAYER, _SCHEME, _RANKS, _ERROR, _PARAMETERS, _FLOPS, _MILLISECONDS, _GAIN)
_CUTS: tuple[tuple[_Column, _Column | None], ...] = (
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
"""What is said more shortly, or not at all, where there is too little room: the first that can best be missed."""


def render_plan(plan: Decisions) -> str:
    """Return the plan's table as plain text."""
    return render_plain(plan_view(plan))


def render_plain(view: Group) -> str:
    """Return a view as plain text in which nothing is cut, without blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=_UNBOUNDED, color_system=None, legacy_windows=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def plan_view(plan: Decisions, width: int | None = None, sites: Sequence[SitePlan] | None = None) -> Group:
    """Return the table, its totals and its notes, for a rich console.

    Args:
        plan: What to show.
        width: Columns that there is room for; as many as it takes if left out. Where it is narrow, columns are shortened
            and then left out, and long names folded in the middle.
        sites: The rows, where not all sites of the plan are to be shown; the totals are always those of the plan.
    """
    rows = plan.sites if sites is None else sites
    parts: list[RenderableType] = [_table(rows, width)] if rows else []
    if len(rows) < len(plan):
        parts.append(Text(f"shown: {len(rows)} of {len(plan)} sites; what follows is of all of them", style="dim"))
    first, *others = totals(plan)
    notes = (Text(f"note: {note}", style="dim") for note in plan.notes)
    return Group(*parts, Text(), Text(first, style="bold"), *map(Text, others), *notes)


def _table(rows: Sequence[SitePlan], width: int | None) -> Table:
    columns, name_width, note_width = _fitted(rows, width)
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


def _cell(column: _Column, site: SitePlan) -> Text:
    """Return a cell as Text, because a name may hold what rich reads as markup."""
    styles = {_SCHEME: "cyan", _GAIN: "green"} if site.factorized else {_SCHEME: "yellow"}
    style = "dim" if column is _NOTE else styles.get(column, "")
    # A name may hold anything, and a line break or a colour code in it would tear the table.
    return Text("".join(one if one.isprintable() else "�" for one in column.text(site)), style=style)


def _fitted(rows: Sequence[SitePlan], width: int | None) -> tuple[list[_Column], int, int]:
    """Return the columns for which there is room, and the widths of the names and of the notes."""
    widths = {column: _width(column, rows) for column in (*_WIDE, *(new for _, new in _CUTS if new), _NOTE)}
    columns = [column for column in _WIDE if column is _NAME or _says_anything(column, rows)]
    has_notes = _says_anything(_NOTE, rows)
    if width is None:
        return [*columns, *([_NOTE] if has_notes else [])], _UNBOUNDED, _UNBOUNDED

    def room() -> int:
        """Return what is left for the names."""
        return width - sum(widths[column] + _GAP for column in columns if column is not _NAME)

    short = max(_LEAST_NAME, width * 3 // 10)
    least = min(_least_name([_NAME.text(one) for one in rows], short, max(short, width // 2)), widths[_NAME])
    for cut, shorter in _CUTS:
        # What would only be shortened gives way to whole names; what would be lost does not.
        if room() >= (widths[_NAME] if shorter is not None else least):
            continue
        if cut in columns:
            place = columns.index(cut)
            columns[place : place + 1] = [shorter] if shorter is not None and _says_anything(shorter, rows) else []
    for_name = min(widths[_NAME], max(room(), 2))
    for_note = room() - for_name - _GAP
    if has_notes and for_note >= min(_LEAST_NOTE, widths[_NOTE]):
        columns.append(_NOTE)
    return columns, for_name, for_note


def _says_anything(column: _Column, rows: Sequence[SitePlan]) -> bool:
    return any(column.text(one) for one in rows)


def _width(column: _Column, rows: Sequence[SitePlan]) -> int:
    return max(cell_len(column.title), *(cell_len(column.text(one)) for one in rows))


def _least_name(names: Sequence[str], least: int, most: int) -> int:
    """Return the least width from ``least`` on at which folded names still differ, if there is one up to ``most``."""
    widths = range(least, most + 1)
    return next((width for width in widths if len({fold(one, width) for one in names}) == len(set(names))), most)


def fold(name: str, width: int) -> str:
    """Return a name that fits, with its middle left out, but for the numbers there, which tell blocks apart.

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
    places = groupby(range(len(middle)), lambda place: middle[place].isdigit())
    words = [list(run) for is_number, run in places if not is_number]
    spare = [place for word in sorted(words, key=len, reverse=True) for place in word]
    shorter = name
    for count in range(1, len(spare) + 1):
        gone = set(spare[:count])
        letters = (None if place in gone else letter for place, letter in enumerate(middle))
        shorter = f"{first}{_with_gaps(letters)}{last}"
        if cell_len(shorter) <= width:
            return shorter
    head = max((width - 1) // 3, 0)
    return f"{shorter[:head]}…{shorter[len(shorter) - (width - 1 - head) :]}" if width > 1 else "…"


def _with_gaps(letters: Iterable[str | None]) -> str:
    """Return text with one sign for each run of letters that is missing."""
    return "".join("…" if gone else "".join(map(str, run)) for gone, run in groupby(letters, lambda one: one is None))

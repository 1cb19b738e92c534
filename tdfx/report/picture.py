"""A plan as a picture: the singular values of every site with the chosen rank, and what the rewrite brings."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from tdfx.errors import ReportError
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan, SitePlan
from tdfx.plans.table import fold
from tdfx.report.files import need, write_whole
from tdfx.report.model_view import ModelView, look
from tdfx.report.spectra import SpectrumCurve
from tdfx.text import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
MOST_COLUMNS = 8
"""Small panels side by side."""
ROWS_OF_A_PAGE = 7
"""Rows of small panels on each page of a PDF; other files have one page, as long as it takes."""

_PANEL = (2.1, 1.45)
"""Inches of a small panel, across and down."""
_HEAD = 2.6
"""Inches of the panels of totals."""
_LETTERS = 26
_INK, _SOFT, _LINE = "#1b1f2a", "#6b7280", "#d8dce5"
_BEFORE, _AFTER = "#a9b1c0", "#0b57a8"
_MODES = ("#0b57a8", "#b3541e")
"""Colours of the first and second mode; they differ in lightness too."""
_FLOOR = 1e-4
"""Singular values below this, relative to the largest, are drawn at the edge."""


def plot(model: nn.Module, plan: Plan, path: str | os.PathLike[str], *, example_inputs: Inputs | None = None) -> None:
    """Draw a plan into a file, which appears whole or not at all.

    On top, what each site takes before and after: time, or operations where times were not measured, and parameters.
    Below, the singular values of each site, on a logarithmic scale relative to the largest, with the chosen rank marked;
    up to eight side by side. A PDF has pages of seven such rows; a PNG or SVG is one picture, as long as it takes.

    Args:
        model: What the plan was made for; it is left as it was.
        plan: What ``tdfx.plan`` gave.
        path: A file ending in .png, .svg or .pdf.
        example_inputs: As for ``tdfx.plan``; needed where sites are seen in a run alone.

    Raises:
        ReportError: matplotlib is not installed, the suffix is another, or the file cannot be written.
        ModelError, PlanError, InputError, WeightError: As for ``tdfx.report.look``.
    """
    check_plot(path)
    write_plot(look(model, plan, example_inputs=example_inputs), path)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise ReportError before the work, not after it, if a picture cannot be drawn into this file."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ReportError(
            f"{str(path)!r} has the suffix {Path(path).suffix!r}, and a picture is written as {', '.join(SUFFIXES)}. "
            f"Name for example spectra.png."
        )
    need("matplotlib.figure", "A picture")


def write_plot(seen: ModelView, path: str | os.PathLike[str]) -> None:
    """Draw a model that was looked at already.

    Raises:
        ReportError: As for ``plot``.
    """
    check_plot(path)
    kind = Path(path).suffix.lower().removeprefix(".")
    data = io.BytesIO()
    # No backend, font size or other setting of the user's own pictures takes part, and none is changed.
    matplotlib = need("matplotlib", "A picture")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "svg.hashsalt": "tdfx", "backend": "agg"}):
        figures = list(_figures(seen, paged=kind == "pdf"))
        if kind == "pdf":
            pdf = need("matplotlib.backends.backend_pdf", "A picture")
            with pdf.PdfPages(data, metadata={"CreationDate": None}) as pages:
                for figure in figures:
                    pages.savefig(figure)
        else:
            (figure,) = figures
            figure.savefig(data, format=kind, dpi=_dpi(figure), metadata={"Date": None} if kind == "svg" else None)
    write_whole(path, data.getvalue())


def _dpi(figure: Figure) -> float:
    """Return dots an inch: fewer for long pictures, so that no program refuses to show one."""
    return min(130.0, 12_000 / figure.get_figheight())


def _figures(seen: ModelView, *, paged: bool) -> Iterator[Figure]:
    """Yield a figure for each page."""
    numbered = [(number, site) for number, site in enumerate(seen.plan, 1) if site.name in seen.spectra]
    columns = max(3, min(MOST_COLUMNS, math.ceil(math.sqrt(2 * len(numbered)))))
    each = columns * ROWS_OF_A_PAGE if paged else max(1, len(numbered))
    for start in range(0, max(1, len(numbered)), each):
        yield _figure(seen, numbered[start : start + each], columns, with_head=start == 0)


def _figure(seen: ModelView, numbered: Sequence[tuple[int, SitePlan]], columns: int, *, with_head: bool) -> Figure:
    figures = need("matplotlib.figure", "A picture")
    rows = math.ceil(len(numbered) / columns)
    head = _HEAD if with_head else 0.0
    width, height = _PANEL[0] * columns, _PANEL[1] * rows + head + 0.75
    layout = need("matplotlib.layout_engine", "A picture").ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05)
    figure: Figure = figures.Figure(figsize=(width, height), layout=layout)
    count = len(seen.plan.factorized)
    figure.suptitle(
        f"{seen.plan.model or 'model'}: {count} of {len(seen.plan)} sites factorized",
        fontsize=12,
        color=_INK,
        x=0.02,
        ha="left",
    )
    top, bottom = _parts(figure, head, _PANEL[1] * rows)
    if top is not None:
        _totals(top, seen.plan)
    if bottom is not None:
        axes = bottom.subplots(rows, columns, squeeze=False).flat
        for place, (number, site) in enumerate(numbered):
            _spectrum(axes[place], number, site, seen.spectra[site.name])
        for place in range(len(numbered), rows * columns):
            axes[place].set_axis_off()
        _legend(bottom, [curve for _, site in numbered for curve in seen.spectra[site.name]], min(4, columns // 2))
    return figure


def _parts(figure: Figure, head: float, rest: float) -> tuple[Any, Any]:
    """Return the parts of a figure for the totals and for the spectra, None for one that is empty."""
    if head and rest:
        top, bottom = cast("Any", figure.subfigures(2, 1, height_ratios=[head, rest]))
        return top, bottom
    whole = figure.subfigures(1, 1)
    return (whole, None) if head else (None, whole)


def _totals(part: Any, plan: Plan) -> None:
    """Draw what each site takes before and after."""
    left, right = part.subplots(1, 2)
    pairs, title, unit = _work(plan)
    _bars(left, pairs, title, unit)
    counts = [(float(one.parameters_before), float(one.parameters_after)) for one in plan]
    rest = plan.other_parameters
    total = f"{short_number(sum(a for a, _ in counts) + rest)} → {short_number(sum(b for _, b in counts) + rest)}"
    _bars(right, counts, f"parameters by site; in all {total}", "parameters")
    handles, labels = right.get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=7.5, frameon=False)


def _work(plan: Plan) -> tuple[list[tuple[float, float]], str, str]:
    """Return time before and after by site, or operations where times were not measured."""
    times = [(one.seconds_before, one.seconds_after) for one in plan]
    if any(before is not None and after is not None for before, after in times):
        pairs = [(1e3 * (before or 0.0), 1e3 * (after or 0.0)) for before, after in times]
        step = plan.step_seconds, plan.step_seconds_after
        before, after = (sum(one) for one in zip(*pairs, strict=True))
        guessed = sum(one.estimated for one in plan)
        by = f"time by site ({guessed} by estimate)" if guessed else "time by site"
        title = f"{by}; in all {before:.3g} → {after:.3g} ms a step"
        if step[0] is not None and step[1] is not None:
            title += f", of the whole step {1e3 * step[0]:.3g} → {1e3 * step[1]:.3g}"
        return pairs, title, "ms a step"
    work = [(float(one.flops_before or 0), float(one.flops_after or 0)) for one in plan]
    if not any(before for before, _ in work):
        return [], "no times or operations: the plan was made without example inputs", ""
    before, after = (sum(one) for one in zip(*work, strict=True))
    return work, f"FLOPs by site, forward; in all {short_number(before)} → {short_number(after)}", "FLOPs"


def _bars(axes: Axes, pairs: Sequence[tuple[float, float]], title: str, unit: str) -> None:
    _quiet(axes)
    axes.set_title(title, fontsize=8.5, color=_INK, loc="left")
    if not pairs:
        axes.set_axis_off()
        return
    ticker = need("matplotlib.ticker", "A picture")
    places = range(1, len(pairs) + 1)
    axes.bar(places, [before for before, _ in pairs], width=0.85, color=_BEFORE, label="before")
    axes.bar(places, [after for _, after in pairs], width=0.5, color=_AFTER, label="after")
    axes.set_xlim(0.3, len(pairs) + 0.7)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: short_number(value) if value >= 100 else f"{value:g}")
    )
    axes.set_ylabel(unit, fontsize=7.5, color=_SOFT)
    axes.set_xlabel("site, as numbered below", fontsize=7.5, color=_SOFT)


def _spectrum(axes: Axes, number: int, site: SitePlan, curves: Sequence[SpectrumCurve]) -> None:
    """Draw the curves of one site."""
    _quiet(axes)
    kept = site.ranks is None
    for curve, colour in zip(curves, _MODES, strict=False):
        values = [max(value, _FLOOR / 2) for value in curve.values]
        # The share of its full rank, so that modes of different sizes fit one panel.
        shares = [(place + 0.5) / len(values) for place in range(len(values))]
        style = {"marker": "o", "markersize": 3} if len(values) == 1 else {}
        axes.plot(shares, values, color=_SOFT if kept else colour, linewidth=1.2, **style)  # type: ignore[arg-type]
        if curve.rank is not None:
            cut = curve.rank / len(values)
            axes.axvline(cut, color=colour, linewidth=0.9, linestyle=(0, (3, 2)))
            if len(curves) == 1:
                axes.fill_between([0, cut], _FLOOR, 1.5, color=colour, alpha=0.07, linewidth=0)
    axes.set_yscale("log")
    lowest = min((value for curve in curves for value in curve.values if value > 0), default=0.1)
    axes.set_ylim(max(_FLOOR, min(0.1, 10 ** math.floor(math.log10(lowest)))), 1.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 1], ["0", "/".join(str(len(curve.values)) for curve in curves)])
    first, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axes.minorticks_off()
    ranks = "/".join(str(curve.rank) for curve in curves) if curves[0].rank is not None else "kept"
    name = fold(site.name or "(root)", _LETTERS)
    # As it is: a name may hold what matplotlib would read as mathematics.
    axes.set_title(
        f"{number} · {name}\n{ranks}", fontsize=6.5, color=_SOFT if kept else _INK, loc="left", parse_math=False
    )


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(labelsize=6.5, colors=_SOFT, length=2, color=_LINE, pad=2)
    axes.grid(axis="y", color=_LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def _legend(part: Any, curves: Sequence[SpectrumCurve], columns: int) -> None:
    """Say under the panels what the colours mean, in so many columns."""
    lines = need("matplotlib.lines", "A picture")
    modes = list(dict.fromkeys(curve.mode for curve in curves if curve.rank is not None))
    found = [lines.Line2D([], [], color=colour, label=_NAMES[index]) for index, colour in enumerate(_MODES)]
    shown = found if any(modes) else [lines.Line2D([], [], color=_MODES[0], label="singular values")]
    shown.append(lines.Line2D([], [], color=_SOFT, label="kept dense"))
    shown.append(lines.Line2D([], [], color=_INK, linestyle=(0, (3, 2)), linewidth=0.9, label="chosen rank"))
    part.legend(handles=shown, loc="outside lower left", ncols=columns, fontsize=7.5, frameon=False)


_NAMES = ("singular values (of the output channels, where there are two)", "singular values of the input channels")

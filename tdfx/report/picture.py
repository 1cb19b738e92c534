"""Draw a plan as a picture: the singular values of every site with the chosen ranks, and the cost before and after."""

from __future__ import annotations

import importlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from tdfx.errors import ReportError
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan, SitePlan
from tdfx.plans.table import fold
from tdfx.report.model_view import ModelView, look, write_report
from tdfx.report.spectra import SpectrumCurve
from tdfx.text import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
MOST_COLUMNS = 8
"""Most spectra next to each other."""
ROWS_PER_PAGE = 7
"""Rows of spectra on each page of a PDF; other files have one page of any height."""

_PANEL = (2.1, 1.45)
"""Width and height of a spectrum, in inches."""
_TOTALS_HEIGHT = 2.6
"""Height of the totals, in inches."""
_MAX_LETTERS = 26
"""Letters of a site's name that fit above its spectrum."""
_INK, _SOFT, _LINE = "#1b1f2a", "#6b7280", "#d8dce5"
_BEFORE, _AFTER = "#a9b1c0", "#0b57a8"
_MODES = ("#0b57a8", "#b3541e")
"""Colours of the first and second mode; they also differ in lightness."""
_MODE_LABELS = (
    "singular values (of the output channels, where there are two)",
    "singular values of the input channels",
)
_FLOOR = 1e-4
"""Singular values below this, relative to the largest, are drawn at the lower edge."""


def plot(model: nn.Module, plan: Plan, path: str | os.PathLike[str], *, example_inputs: Inputs | None = None) -> None:
    """Draw a plan into a file, which appears complete or not at all.

    At the top are the costs of each site before and after: its time, or its operations if times were not measured, and its
    parameters. Below are the singular values of each site, on a logarithmic scale relative to the largest, with the chosen
    rank marked, up to eight in a row. A PDF has seven such rows on a page; a PNG or SVG is one picture of any height.

    Args:
        model: The model that the plan was made for; it is left as it was.
        plan: What ``tdfx.plan`` returned.
        path: A file ending in .png, .svg or .pdf.
        example_inputs: As for ``tdfx.plan``; needed if only a run shows all sites.

    Raises:
        ReportError: matplotlib is not installed, the suffix is not one of these, or the file cannot be written.
        ModelError, PlanError, InputError, WeightError: As for ``tdfx.report.look``.
    """
    check_plot(path)
    write_plot(look(model, plan, example_inputs=example_inputs), path)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise ReportError, before any work is done, if a picture cannot be drawn into this file."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ReportError(
            f"{str(path)!r} has the suffix {Path(path).suffix!r}, and a picture is written as {', '.join(SUFFIXES)}. "
            f"Name for example spectra.png."
        )
    _import("matplotlib.figure")


def write_plot(view: ModelView, path: str | os.PathLike[str]) -> None:
    """Draw a model view that was made already; errors as for ``plot``."""
    check_plot(path)
    kind = Path(path).suffix.lower().removeprefix(".")
    data = io.BytesIO()
    # The user's settings of matplotlib, such as the backend and font size, are not used and not changed.
    matplotlib = _import("matplotlib")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "svg.hashsalt": "tdfx", "backend": "agg"}):
        figures = list(_figures(view, paged=kind == "pdf"))
        if kind == "pdf":
            pdf = _import("matplotlib.backends.backend_pdf")
            with pdf.PdfPages(data, metadata={"CreationDate": None}) as pages:
                for figure in figures:
                    pages.savefig(figure)
        else:
            (figure,) = figures
            dpi = min(130.0, 12_000 / figure.get_figheight())  # some programs refuse to open very tall pictures
            figure.savefig(data, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    write_report(path, data.getvalue())


def _import(module: str) -> ModuleType:
    """Return a module of matplotlib, or raise ReportError if that is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReportError(
            f"A picture needs matplotlib, which cannot be imported ({error}). Install it: pip install 'tdfx[report]'"
        ) from error


def _figures(view: ModelView, *, paged: bool) -> Iterator[Figure]:
    numbered = [(number, site) for number, site in enumerate(view.plan, 1) if site.name in view.spectra]
    columns = max(3, min(MOST_COLUMNS, math.ceil(math.sqrt(2 * len(numbered)))))
    per_page = columns * ROWS_PER_PAGE if paged else max(1, len(numbered))
    for start in range(0, max(1, len(numbered)), per_page):
        yield _figure(view, numbered[start : start + per_page], columns, with_totals=start == 0)


def _figure(view: ModelView, numbered: Sequence[tuple[int, SitePlan]], columns: int, *, with_totals: bool) -> Figure:
    rows = math.ceil(len(numbered) / columns)
    totals_height = _TOTALS_HEIGHT if with_totals else 0.0
    width, height = _PANEL[0] * columns, _PANEL[1] * rows + totals_height + 0.75
    layout = _import("matplotlib.layout_engine").ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05)
    figure: Figure = _import("matplotlib.figure").Figure(figsize=(width, height), layout=layout)
    title = f"{view.plan.model or 'model'}: {len(view.plan.factorized)} of {len(view.plan)} sites factorized"
    figure.suptitle(title, fontsize=12, color=_INK, x=0.02, ha="left")
    top, bottom = _divide(figure, totals_height, _PANEL[1] * rows)
    if top is not None:
        _draw_totals(top, view.plan)
    if bottom is not None:
        axes = bottom.subplots(rows, columns, squeeze=False).flat
        for panel, (number, site) in zip(axes, numbered, strict=False):
            _draw_spectrum(panel, number, site, view.spectra[site.name])
        for panel in axes[len(numbered) :]:
            panel.set_axis_off()
        _draw_legend(bottom, [curve for _, site in numbered for curve in view.spectra[site.name]], min(4, columns // 2))
    return figure


def _divide(figure: Figure, top_height: float, bottom_height: float) -> tuple[Any, Any]:
    """Return the parts of a figure for the totals and for the spectra; None for an empty part."""
    if top_height and bottom_height:
        return tuple(cast("Any", figure.subfigures(2, 1, height_ratios=[top_height, bottom_height])))
    whole = figure.subfigures(1, 1)
    return (whole, None) if top_height else (None, whole)


def _draw_totals(part: Any, plan: Plan) -> None:
    left, right = part.subplots(1, 2)
    _draw_bars(left, *_time_or_operations(plan))
    counts = [(float(site.parameters_before), float(site.parameters_after)) for site in plan]
    total = f"{short_number(plan.parameters_before)} → {short_number(plan.parameters_after)}"
    _draw_bars(right, counts, f"parameters by site; in all {total}", "parameters")
    handles, labels = right.get_legend_handles_labels()
    part.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=7.5, frameon=False)


def _time_or_operations(plan: Plan) -> tuple[list[tuple[float, float]], str, str]:
    """Return times before and after by site, or operations if times were not measured, with a title and the unit."""
    times = [(site.seconds_before, site.seconds_after) for site in plan]
    if any(before is not None and after is not None for before, after in times):
        pairs = [(1e3 * (before or 0.0), 1e3 * (after or 0.0)) for before, after in times]
        before, after = (sum(side) for side in zip(*pairs, strict=True))
        estimated = sum(site.estimated for site in plan)
        title = f"time by site ({estimated} estimated)" if estimated else "time by site"
        title += f"; in all {before:.3g} → {after:.3g} ms per step"
        if plan.step_seconds is not None and plan.step_seconds_after is not None:
            title += (
                f", of the whole step {1e3 * plan.step_seconds:.3g} → {1e3 * plan.step_seconds_after:.3g} (predicted)"
            )
        return pairs, title, "ms per step"
    operations = [(float(site.flops_before or 0), float(site.flops_after or 0)) for site in plan]
    if not any(before for before, _ in operations):
        return [], "no times or operations: the plan was made without example inputs", ""
    before, after = (sum(side) for side in zip(*operations, strict=True))
    return operations, f"FLOPs by site, forward; in all {short_number(before)} → {short_number(after)}", "FLOPs"


def _draw_bars(axes: Axes, pairs: Sequence[tuple[float, float]], title: str, unit: str) -> None:
    _soften(axes)
    axes.set_title(title, fontsize=8.5, color=_INK, loc="left")
    if not pairs:
        axes.set_axis_off()
        return
    ticker = _import("matplotlib.ticker")
    places = range(1, len(pairs) + 1)
    axes.bar(places, [before for before, _ in pairs], width=0.85, color=_BEFORE, label="before")
    axes.bar(places, [after for _, after in pairs], width=0.5, color=_AFTER, label="after")
    axes.set_xlim(0.3, len(pairs) + 0.7)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value) if value >= 100 else f"{value:g}")
    axes.set_ylabel(unit, fontsize=7.5, color=_SOFT)
    axes.set_xlabel("site, as numbered below", fontsize=7.5, color=_SOFT)


def _draw_spectrum(axes: Axes, number: int, site: SitePlan, curves: Sequence[SpectrumCurve]) -> None:
    _soften(axes)
    kept = site.ranks is None
    for curve, colour in zip(curves, _MODES, strict=False):
        values = [max(value, _FLOOR / 2) for value in curve.values]
        # The horizontal axis is a share of the full rank, so that modes of different sizes share it.
        shares = [(index + 0.5) / len(values) for index in range(len(values))]
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
    title = f"{number} · {fold(site.name or '(root)', _MAX_LETTERS)}\n{ranks}"
    # A name may contain dollar signs, which matplotlib would read as mathematics.
    axes.set_title(title, fontsize=6.5, color=_SOFT if kept else _INK, loc="left", parse_math=False)


def _soften(axes: Axes) -> None:
    """Draw frame, ticks and grid in soft colours."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(labelsize=6.5, colors=_SOFT, length=2, color=_LINE, pad=2)
    axes.grid(axis="y", color=_LINE, linewidth=0.5)
    axes.set_axisbelow(True)


def _draw_legend(part: Any, curves: Sequence[SpectrumCurve], columns: int) -> None:
    line = _import("matplotlib.lines").Line2D
    labels = _MODE_LABELS if any(curve.mode for curve in curves if curve.rank is not None) else ("singular values",)
    handles = [line([], [], color=colour, label=label) for colour, label in zip(_MODES, labels, strict=False)]
    handles.append(line([], [], color=_SOFT, label="kept dense"))
    handles.append(line([], [], color=_INK, linestyle=(0, (3, 2)), linewidth=0.9, label="chosen rank"))
    part.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=7.5, frameon=False)

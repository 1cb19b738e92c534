"""Write a plan as one HTML page that needs no network, no other file and no server."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import jinja2
import torch
from torch import nn

import tdfx
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan, SitePlan
from tdfx.plans.table import totals
from tdfx.report.model_view import ModelView, look, write_report
from tdfx.report.network_svg import drawings_of
from tdfx.report.spectra import SpectrumCurve
from tdfx.report.totals import BeforeAfter, totals_of
from tdfx.text import before_after, milliseconds

_POINTS = 96
"""Number of points in the drawing of a spectrum."""


def page(model: nn.Module, plan: Plan, path: str | os.PathLike[str], *, example_inputs: Inputs | None = None) -> None:
    """Write a report of a plan as one self-contained HTML file, which appears complete or not at all.

    It has the totals, a table of the sites that can be sorted and filtered, the spectrum of each site, and the network's
    graph. It loads nothing from elsewhere, and its content security policy tells the browser so.

    Args:
        model: The model that the plan was made for; it is left as it was.
        plan: What ``tdfx.plan`` returned.
        path: The file, usually with the suffix .html.
        example_inputs: As for ``tdfx.plan``; needed if only a run shows all sites.

    Raises:
        ReportError: The file cannot be written.
        ModelError, PlanError, InputError, WeightError: As for ``tdfx.report.look``.
    """
    write_page(look(model, plan, example_inputs=example_inputs), path)


def write_page(view: ModelView, path: str | os.PathLike[str]) -> None:
    """Write the page of a model view that was made already; raise ReportError if that fails."""
    write_report(path, render_page(view).encode())


def render_page(view: ModelView) -> str:
    """Return the text of the page."""
    folder = files("tdfx.report") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tdfx.report"),
        autoescape=True,  # names of layers may contain HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = [column for column in _COLUMNS if any(column.text(site) for site in view.plan)]
    if not any(column.title == "ms" for column in columns):  # nothing was timed
        columns = [replace(column, title="modelled gain") if column.title == "gain" else column for column in columns]
    text = environment.get_template("page.html.jinja").render(
        plan=view.plan,
        columns=columns,
        rows=[_row(site, columns) for site in view.plan],
        totals=totals_of(view.plan),
        bar=_bar_percent,
        lines=totals(view.plan),
        drawings=drawings_of(view.network, view.plan),
        network=view.network,
        spectra=[[_curve_data(curve) for curve in view.spectra.get(site.name, ())] for site in view.plan],
        versions=f"tdfx {tdfx.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        style=style,
        script=script,
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
    )
    return str(text)


@dataclass(frozen=True, slots=True)
class _PageColumn:
    title: str
    text: Callable[[SitePlan], str]
    key: Callable[[SitePlan], float | None] | None = None
    """What it is sorted by, by default its text; a site whose key is None comes last."""


_COLUMNS = (
    _PageColumn("layer", lambda site: f"{site.kind} {'×'.join(map(str, site.shape)) or '?'}"),
    _PageColumn("scheme", lambda site: site.scheme or "kept"),
    _PageColumn(
        "ranks", lambda site: "/".join(map(str, site.ranks or ())), lambda site: max(site.ranks) if site.ranks else None
    ),
    _PageColumn("error", lambda site: f"{site.error:.1%}" if site.error is not None else "", lambda site: site.error),
    _PageColumn(
        "parameters",
        lambda site: before_after(site.parameters_before, site.parameters_after),
        lambda site: site.parameters_before,
    ),
    _PageColumn(
        "FLOPs", lambda site: before_after(site.flops_before, site.flops_after), lambda site: site.flops_before
    ),
    _PageColumn(
        "activations",
        lambda site: before_after(site.activations_before, site.activations_after),
        lambda site: site.activations_before,
    ),
    _PageColumn(
        "ms",
        lambda site: milliseconds(site.seconds_before, site.seconds_after, estimated=site.estimated),
        lambda site: site.seconds_before,
    ),
    _PageColumn("gain", lambda site: f"{site.gain:.2f}×" if site.gain is not None else "", lambda site: site.gain),
    _PageColumn(
        "why", lambda site: site.note if site.factorized else ": ".join(filter(None, (str(site.reason), site.note)))
    ),
)


def _row(site: SitePlan, columns: list[_PageColumn]) -> dict[str, Any]:
    cells = []
    for column in columns:
        text = key = column.text(site)
        if column.key is not None:
            value = column.key(site)
            key = "" if value is None else repr(float(value))
        cells.append({"title": column.title, "text": text, "key": key})
    return {"name": site.name or "(root)", "factorized": site.factorized, "cells": cells}


def _bar_percent(total: BeforeAfter, value: float) -> str:
    """Return the length of a bar in percent of the longer one."""
    return f"{100 * value / max(total.before, total.after, 1e-300):.1f}"


def _curve_data(curve: SpectrumCurve) -> dict[str, Any]:
    """Return the points of a curve that the page draws, with the chosen rank."""
    count = len(curve.values)
    points = {round(index * (count - 1) / max(1, _POINTS - 1)) for index in range(_POINTS)}
    # Also the first values, which fall fastest, and those next to the rank.
    points |= set(range(8)) | ({curve.rank - 1, curve.rank} if curve.rank else set())
    places = sorted(point for point in points if 0 <= point < count)
    return {
        "mode": curve.mode,
        "full": count,
        "rank": curve.rank,
        "energy": None if curve.energy is None else round(curve.energy, 5),
        "at": [place + 1 for place in places],
        # Three digits are more than a screen shows.
        "values": [float(f"{curve.values[place]:.3g}") if curve.values[place] > 1e-8 else 0.0 for place in places],
    }


def _policy_hash(text: str) -> str:
    """Return the hash by which a content security policy allows a style or a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

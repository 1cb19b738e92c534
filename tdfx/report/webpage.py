"""A plan as one page of HTML that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import torch
from torch import nn

import tdfx
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan, SitePlan
from tdfx.plans.table import totals
from tdfx.report.drawing import drawings_of
from tdfx.report.files import write_whole
from tdfx.report.model_view import ModelView, look
from tdfx.report.spectra import SpectrumCurve
from tdfx.report.totals import Total, totals_of
from tdfx.text import before_after, milliseconds

_POINTS = 96
"""Points of a curve that the page draws."""


def page(model: nn.Module, plan: Plan, path: str | os.PathLike[str], *, example_inputs: Inputs | None = None) -> None:
    """Write a report of a plan as one self-contained HTML file, which appears whole or not at all.

    It has the totals, a table of the sites that sorts and filters, the spectrum of each, and the network's graph. It
    loads nothing from anywhere, and says so to the browser in its content security policy.

    Args:
        model: What the plan was made for; it is left as it was.
        plan: What ``tdfx.plan`` gave.
        path: The file, best with the suffix .html.
        example_inputs: As for ``tdfx.plan``; needed where sites are seen in a run alone.

    Raises:
        ReportError: The file cannot be written.
        ModelError, PlanError, InputError, WeightError: As for ``tdfx.report.look``.
    """
    write_page(look(model, plan, example_inputs=example_inputs), path)


def write_page(seen: ModelView, path: str | os.PathLike[str]) -> None:
    """Write the page of a model that was looked at already.

    Raises:
        ReportError: The file cannot be written.
    """
    write_whole(path, render_page(seen).encode())


def render_page(seen: ModelView) -> str:
    """Return the text of the page."""
    folder = files("tdfx.report") / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("tdfx.report"),
        # A name may hold anything, HTML too.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = [one for one in _COLUMNS if any(one.text(site) for site in seen.plan)]
    text = made.get_template("page.html.jinja").render(
        plan=seen.plan,
        columns=columns,
        rows=[_row(site, columns) for site in seen.plan],
        totals=totals_of(seen.plan),
        bar=_bar,
        lines=totals(seen.plan),
        drawings=drawings_of(seen.network, seen.plan),
        network=seen.network,
        spectra=[[_curve_data(one) for one in seen.spectra.get(site.name, ())] for site in seen.plan],
        versions=f"tdfx {tdfx.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return str(text)


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of the table."""

    title: str
    text: Callable[[SitePlan], str]
    key: Callable[[SitePlan], float | None] | None = None
    """By which it is sorted; by its text if left out. None sorts last."""

    @property
    def numeric(self) -> bool:
        return self.key is not None


_COLUMNS = (
    _Column("layer", lambda one: f"{one.kind} {'×'.join(map(str, one.shape)) or '?'}"),
    _Column("scheme", lambda one: one.scheme or "kept"),
    _Column(
        "ranks", lambda one: "/".join(map(str, one.ranks or ())), lambda one: max(one.ranks) if one.ranks else None
    ),
    _Column("error", lambda one: f"{one.error:.1%}" if one.error is not None else "", lambda one: one.error),
    _Column(
        "parameters",
        lambda one: before_after(one.parameters_before, one.parameters_after),
        lambda one: one.parameters_before,
    ),
    _Column("FLOPs", lambda one: before_after(one.flops_before, one.flops_after), lambda one: one.flops_before),
    _Column(
        "ms",
        lambda one: milliseconds(one.seconds_before, one.seconds_after, estimated=one.estimated),
        lambda one: one.seconds_before,
    ),
    _Column("gain", lambda one: f"{one.gain:.2f}×" if one.gain is not None else "", lambda one: one.gain),
    _Column("why", lambda one: one.note if one.factorized else ": ".join(filter(None, (str(one.reason), one.note)))),
)


def _row(site: SitePlan, columns: list[_Column]) -> dict[str, Any]:
    cells = [
        {"title": one.title, "text": one.text(site), "key": _number(one.key(site)) if one.key else one.text(site)}
        for one in columns
    ]
    return {"name": site.name or "(root)", "factorized": site.factorized, "cells": cells}


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _bar(total: Total, value: float) -> str:
    """Return how long a bar is, in percent of the longer one."""
    return f"{100 * value / max(total.before, total.after, 1e-300):.1f}"


def _curve_data(curve: SpectrumCurve) -> dict[str, Any]:
    """Return what the page draws of a curve: as many points as it can show, the rank among them."""
    count = len(curve.values)
    wanted = {round(index * (count - 1) / max(1, _POINTS - 1)) for index in range(_POINTS)}
    # The first values fall fastest, and the eye rests on those around the rank.
    wanted |= set(range(min(8, count))) | ({curve.rank - 1, curve.rank} if curve.rank else set())
    places = sorted(one for one in wanted if 0 <= one < count)
    return {
        "mode": curve.mode,
        "full": count,
        "rank": curve.rank,
        "energy": None if curve.energy is None else round(curve.energy, 5),
        "at": [place + 1 for place in places],
        "values": [_three(curve.values[place]) for place in places],
    }


def _three(value: float) -> float:
    """Return a value in [0, 1] with three figures, which is more than a screen shows."""
    return round(value, 2 - math.floor(math.log10(value))) if value > 1e-8 else 0.0


def _hash(text: str) -> str:
    """Return what a content security policy calls a text by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

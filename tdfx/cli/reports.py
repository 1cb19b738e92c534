"""The picture and the page that ``tdfx inspect`` writes."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Plan
from tdfx.progress import waiting
from tdfx.report.model_view import look
from tdfx.report.picture import write_plot
from tdfx.report.webpage import write_page


def write_reports(
    model: nn.Module, plan: Plan, inputs: Inputs | None, plot_file: Path | None, html_file: Path | None
) -> None:
    """Write those that were asked for, from one look at the model."""
    if plot_file is None and html_file is None:
        return
    seen = look(model, plan, example_inputs=inputs)
    with waiting("drawing"):
        if plot_file is not None:
            write_plot(seen, plot_file)
        if html_file is not None:
            write_page(seen, html_file)

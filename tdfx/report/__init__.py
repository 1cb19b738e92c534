"""What a plan would do, as a picture, as a page, and as numbers for a logger.

>>> import tdfx.report, torch
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
>>> plan = tdfx.plan(model, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
>>> [curve.rank for curve in tdfx.report.look(model, plan).spectra["0"]]
[16]
"""

from tdfx.plans.scalars import Writer, log_plan
from tdfx.report.model_view import ModelView, look
from tdfx.report.picture import plot
from tdfx.report.spectra import SpectrumCurve
from tdfx.report.webpage import page

__all__ = ["ModelView", "SpectrumCurve", "Writer", "log_plan", "look", "page", "plot"]

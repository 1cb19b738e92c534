"""What follows a switch: the learning rates of the factors, and the log."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from tdfx.errors import OptimizerError, TdfxWarning
from tdfx.plans.plan import Plan
from tdfx.plans.scalars import Writer, log_plan
from tdfx.training.methods.factor_rate import FactorRate


class FactorRates:
    """The raised learning rates of the factors in all optimizers of a switch."""

    def __init__(self) -> None:
        self._rates: tuple[FactorRate, ...] = ()

    def set(self, model: nn.Module, optimizers: Sequence[Optimizer], plan: Plan, times: float | None) -> None:
        """Raise the learning rate of the factors; of none where an optimizer holds wider copies of them.

        ``times`` is the ``factor_rate`` of ``Switch``.
        """
        in_loss = any(site.metric == "loss" for site in plan.factorized)
        wanted = times != 1 and (in_loss or times is not None)
        rates = []
        for optimizer in optimizers if wanted else ():
            if isinstance(optimizer, SGD):
                with suppress(OptimizerError):
                    rates.append(FactorRate(model, optimizer, times))
        self._replace(rates)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each rate, in plain types and tensors."""
        return [rate.state_dict() for rate in self._rates]

    def load_state_dict(self, states: Iterable[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> None:
        """Go on from what ``state_dict`` gave, with the optimizers that train the model now."""
        pairs = zip([each for each in optimizers if isinstance(each, SGD)], states, strict=False)
        self._replace([FactorRate.resumed(each, state) for each, state in pairs])

    def _replace(self, rates: Sequence[FactorRate]) -> None:
        for rate in self._rates:
            rate.remove()
        self._rates = tuple(rates)


def log_switch(writer: Writer | None, plan: Plan, step: int, times: Sequence[float]) -> None:
    """Log a switch at a step; a logger that fails must not undo it, since the optimizer was changed too."""
    if writer is None:
        return
    try:
        log_plan(writer, plan, step)
        if times:
            writer.add_scalar("tdfx/step_ms_before_switch", 1e3 * statistics.median(times), step)
    except Exception as error:  # of whatever class the logger has
        warnings.warn(f"The switch at step {step} was not logged: {error!r}.", TdfxWarning, stacklevel=2)

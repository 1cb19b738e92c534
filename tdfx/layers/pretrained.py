"""What ``save_pretrained`` of Transformers writes of factorized layers, so that ``from_pretrained`` leaves none at random.

Transformers only warns of weights that it does not find, and initializes them. What it refuses to load is a folder whose
``config.json`` describes a quantization without its method. There the plan is stored, for ``tdfx.integrations.pretrained``.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tdfx.errors import TdfxWarning
from tdfx.kinds.registry import is_candidate
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.plans.plan import Plan, SitePlan

ENTRY = "quantization_config"
"""The entry of ``config.json`` that holds the plan."""
_NOTE = "factorized_by_tdfx"
_HOW_TO_LOAD = (
    "Import tdfx.integrations.transformers before from_pretrained; its load_pretrained(folder) returns the dense model."
)


def describe_when_saved() -> None:
    """Let ``save_pretrained`` write the plan of factorized layers into ``config.json``, if Transformers is loaded.

    The method is wrapped for all models, because the one that is saved may only hold the one that was rewritten.
    """
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    save = None if base is None else base.save_pretrained
    if save is None or hasattr(save, _NOTE):
        return

    @functools.wraps(save)
    def save_pretrained(self: Any, *arguments: Any, **named: Any) -> Any:
        with _described(self):
            return save(self, *arguments, **named)

    setattr(save_pretrained, _NOTE, True)
    base.save_pretrained = save_pretrained  # type: ignore[union-attr]


def entry_of(plan: Plan) -> dict[str, Any]:
    """Return the entry of ``config.json`` for a plan."""
    return {_NOTE: _HOW_TO_LOAD, "plan": json.loads(plan.to_json())}


def is_entry(entry: Any) -> bool:
    """Return True for an entry of ``config.json`` that holds a plan; earlier versions wrote it as a quantization method."""
    return isinstance(entry, dict) and (_NOTE in entry or entry.get("quant_method") == "tdfx")


@contextmanager
def _described(model: nn.Module) -> Iterator[None]:
    """Let the config of a model hold the plan of its factorized layers, if it has any, while it is saved."""
    plan, config = plan_of(model), getattr(model, "config", None)
    if config is None or not plan.sites:
        yield
        return
    if getattr(config, ENTRY, None) is not None:
        warnings.warn(
            f"{type(model).__name__} is quantized and holds {len(plan.sites)} factorized layers, and config.json can "
            f"describe only one of these: from_pretrained would leave the layers at random. Save tdfx.merge(model).",
            TdfxWarning,
            stacklevel=4,
        )
        yield
        return
    setattr(config, ENTRY, entry_of(plan))
    try:
        yield
    finally:
        delattr(config, ENTRY)


def plan_of(model: nn.Module) -> Plan:
    """Return a plan by which the dense model would get the factorized layers that a model has."""
    layers = {path.replace("_orig_mod.", ""): layer for path, layer in model.named_modules()}
    sites = [_site(path, layer, layers) for path, layer in layers.items() if isinstance(layer, Factorized)]
    return Plan(sites=tuple(sites), emit="modules")


def _site(path: str, layer: Factorized, layers: dict[str, nn.Module]) -> SitePlan:
    is_parameter = isinstance(layer, FactorizedParameter)
    owner = path.rpartition(".")[0]
    operation, dense = layer.operation, layer.operation.parameters
    return SitePlan(
        name=owner if is_parameter and is_candidate(layers[owner]) else path,
        parameter=path if is_parameter else None,
        kind=layer.kind.name,
        shape=operation.weight_shape,
        groups=operation.groups,
        transposed=operation.transposed,
        calls=1,
        scheme=layer.origin.scheme,
        ranks=layer.origin.ranks,
        parameters_before=dense,
        parameters_after=sum(weight.numel() for weight in layer.weights),
    )

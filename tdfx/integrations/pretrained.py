"""Factorized models of Transformers in folders: by the plan in ``config.json``, ``from_pretrained`` builds the layers.

Without it, ``from_pretrained`` would leave the weights that it does not find as they were initialized. Transformers lets
other packages build a model before its weights are loaded only as a kind of quantization, so the plan is stored as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tdfx.api import merge
from tdfx.checkpoint.sealed_file import read_sealed
from tdfx.errors import CheckpointError
from tdfx.integrations.follow import factorize_like, sites_of
from tdfx.layers.factorized import Factorized
from tdfx.plans.plan import Plan
from tdfx.wrappers.in_place import InPlaceModule

FILE = "tdfx.pt"
"""The file in a checkpoint's folder that holds the state of the callback."""
_METHOD = "tdfx"
_ADVICE = "The folder was written by another model than its config.json describes."


def load_pretrained(folder: str | Path, model_class: Any = None, *, merged: bool = True, **arguments: Any) -> nn.Module:
    """Load a model of Transformers from a folder that may hold factors.

    ``from_pretrained`` does so too, if this module is imported, for what was saved by this version of tdfx.

    Args:
        folder: What ``save_pretrained`` or a Trainer with ``SwitchCallback`` has written, a checkpoint for example.
        model_class: The class of the model; by default the one that ``config.json`` names.
        merged: Whether to return the dense model, the factors multiplied out.
        arguments: Other arguments of ``from_pretrained``.

    Raises:
        CheckpointError: The folder names no class of Transformers, or its factors do not go with its plan.
    """
    config = AutoConfig.from_pretrained(folder)
    if model_class is None:
        names = config.architectures or [""]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise CheckpointError(
                f"The config.json in {str(folder)!r} names the architecture {names[0]!r}, which Transformers does not have. "
                f"Pass the class: load_pretrained(folder, MyModel)."
            )
    state = read_sealed(Path(folder, FILE)) if Path(folder, FILE).exists() else None
    if state is not None and not _is_marked(config):
        plan = None if state["merged"] else state["switch"]["plan"]
        if plan is not None:
            config.quantization_config = _marker(Plan.from_json(plan))
    model: Any = model_class.from_pretrained(folder, config=config, **arguments)
    if merged and any(isinstance(module, Factorized) for module in model.modules()):
        part = InPlaceModule(model)
        part.replace_with(merge(part))
        mark_config(model, None)
    return model  # type: ignore[no-any-return]


def mark_config(model: nn.Module, plan: Plan | None) -> None:
    """Let the config of a model of Transformers say how it is factorized, if it is; it is saved beside the weights."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return
    factorized = any(isinstance(module, Factorized) for module in model.modules())
    if factorized and plan is not None and getattr(config, "quantization_config", None) is None:
        config.quantization_config = _marker(plan)
    elif not factorized and _is_marked(config):
        del config.quantization_config


def _marker(plan: Plan) -> dict[str, Any]:
    return {"quant_method": _METHOD, "plan": json.loads(plan.to_json())}


def _is_marked(config: PretrainedConfig) -> bool:
    marker = getattr(config, "quantization_config", None)
    return isinstance(marker, Mapping) and marker.get("quant_method") == _METHOD


class FactorizedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry in ``config.json`` of a factorized model."""

    def __init__(self, plan: Mapping[str, Any], **rest: Any) -> None:
        self.quant_method = _METHOD
        self.plan = dict(plan)


class FactorizedLoader(HfQuantizer):  # type: ignore[misc]
    """Factorizes a model that ``from_pretrained`` has built, before its weights are loaded."""

    requires_calibration = False
    required_packages: tuple[str, ...] = ()
    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self, *arguments: Any, **named: Any) -> bool:
        """Return True: the factors are parameters like others."""
        return True

    def _process_model_before_weight_loading(self, model: Any, *arguments: Any, **named: Any) -> Any:
        self._plan = Plan.from_json(json.dumps(self.quantization_config.plan))
        factorize_like(InPlaceModule(model), self._plan, sites_of(self._plan), _ADVICE)
        for module in model.modules():
            if isinstance(module, Factorized):
                module._is_hf_initialized = True  # else its dense weight would be initialized
        return model

    def _process_model_after_weight_loading(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """Leave an ordinary model: it is not quantized, and can be trained and saved."""
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        model.is_quantized = False
        del model.config.quantization_config
        mark_config(model, self._plan)
        return model


AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = FactorizedConfig
AUTO_QUANTIZER_MAPPING[_METHOD] = FactorizedLoader

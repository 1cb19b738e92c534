"""Factorized models of Transformers in folders: by the plan in ``config.json``, ``from_pretrained`` builds the layers.

Transformers lets other packages build a model before its weights are loaded only as a kind of quantization. Without this
module it refuses the folders: see ``tdfx.layers.pretrained``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tdfx.api import merge
from tdfx.checkpoint.sealed_file import read_sealed
from tdfx.errors import CheckpointError
from tdfx.integrations.follow import factorize_like, sites_of
from tdfx.kinds.registry import is_candidate, operation_of
from tdfx.layers.factorized import Factorized
from tdfx.layers.pretrained import ENTRY, entry_of, is_entry
from tdfx.plans.plan import Plan, SitePlan
from tdfx.wrappers.in_place import InPlaceModule

FILE = "tdfx.pt"
"""The file in a checkpoint's folder that holds the state of the callback."""
_METHOD = "tdfx"
_LOADED = "_is_hf_initialized"
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
    if state is not None and not is_entry(getattr(config, ENTRY, None)):
        plan = None if state["merged"] else state["switch"]["plan"]
        if plan is not None:
            setattr(config, ENTRY, entry_of(Plan.from_json(plan)))
    model: Any = model_class.from_pretrained(folder, config=config, **arguments)
    if merged and any(isinstance(module, Factorized) for module in model.modules()):
        part = InPlaceModule(model)
        part.replace_with(merge(part))
    return model  # type: ignore[no-any-return]


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

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse weights without the factors; only Transformers 4 calls this, and it does not mark what it has loaded."""
        for path, layer in model.named_modules():
            if isinstance(layer, Factorized):
                names = {f"{path}.{name}".removeprefix(".") for name, _ in layer.factors.named_parameters("factors")}
                if names & set(missing_keys):
                    raise _no_factors(path)
        return missing_keys

    def _process_model_before_weight_loading(self, model: Any, *arguments: Any, **named: Any) -> Any:
        plan = Plan.from_json(json.dumps(self.quantization_config.plan))
        plan = replace(plan, sites=tuple(_sites_in(model, plan)))
        factorize_like(InPlaceModule(model), plan, sites_of(plan), _ADVICE)
        for module in model.modules():
            if isinstance(module, Factorized):
                setattr(module, _LOADED, True)  # else its dense weight would be initialized
        return model

    def _process_model_after_weight_loading(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """Leave an ordinary model: it is not quantized, and can be trained and saved."""
        _check_loaded(model)
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        model.is_quantized = False
        delattr(model.config, ENTRY)
        for part in model.modules():
            if isinstance(part, transformers.PreTrainedModel):
                # Transformers 4 would write this dtype of a config without the entry, and no JSON can hold it.
                vars(part.config).pop("_pre_quantization_dtype", None)
        return model


def _check_loaded(model: nn.Module) -> None:
    """Raise CheckpointError if a factor got no values, where Transformers marks the parameters that it has loaded."""
    if not any(hasattr(parameter, _LOADED) for parameter in model.parameters()):
        return
    for path, layer in model.named_modules():
        if isinstance(layer, Factorized) and not all(
            hasattr(weight, _LOADED) or weight.is_meta for weight in layer.weights
        ):
            raise _no_factors(path)


def _no_factors(path: str) -> CheckpointError:
    return CheckpointError(
        f"The config.json says that {path!r} is factorized, and the weights beside it hold no such factors: they are of "
        f"another model. Save the model again; or, if the weights are dense, delete {ENTRY!r} from the config.json."
    )


def _sites_in(model: Any, plan: Plan) -> Iterator[SitePlan]:
    """Yield the factorized sites of a plan that a model has, under its own names.

    A head may be loaded without its base model, or a base model with another head: Transformers then adds or removes the
    base model's name, and leaves out what only the saved model has. A layer of another size, such as a head for other
    classes, stays dense, and Transformers initializes it and says so.
    """
    base = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    names = modules.keys() | {name for name, _ in model.named_parameters()}
    for site in plan.factorized:
        path = site.parameter or site.name
        for rename in (str, lambda name: name.removeprefix(base), lambda name: base + name):
            if rename(path) in names:
                layer = modules.get(rename(path))
                operation = operation_of(layer) if layer is not None and is_candidate(layer) else None
                if operation is not None and operation.weight_shape != site.shape:
                    break
                yield replace(site, name=rename(site.name), parameter=site.parameter and rename(site.parameter))
                break


def _with_method(entry: Any) -> bool:
    """Tell whether Transformers knows a method of quantization; a plan is given the name of one that this module adds."""
    if is_entry(entry):
        entry["quant_method"] = _METHOD
    return bool(_supports(entry))


_supports = AutoHfQuantizer.supports_quant_method
AutoHfQuantizer.supports_quant_method = staticmethod(_with_method)
AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = FactorizedConfig
AUTO_QUANTIZER_MAPPING[_METHOD] = FactorizedLoader

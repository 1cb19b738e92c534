"""In which precision and memory format a training loop computes, as its own forward passes show."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from tdfx.cost.count import Flow
from tdfx.cost.setting import autocast_now, computing_in
from tdfx.devices import has_tf32
from tdfx.errors import TdfxWarning
from tdfx.layers.module_state import COMPILED


@dataclass(frozen=True, slots=True)
class SiteSetting:
    """How one call of a site computed."""

    dtype: torch.dtype
    """That of its output."""
    autocast: torch.dtype | None
    channels_last: bool
    """True if its input had its channels innermost in memory."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """What was in force around a forward pass of the model in its training loop."""

    device: str
    """The kind of device of the model's inputs."""
    autocast: torch.dtype | None
    """The dtype in which autocast computed; None where it was off."""
    sites: Mapping[str, SiteSetting] = field(default_factory=dict)
    """Path of a weight -> how a call with it computed, where that was seen."""

    @classmethod
    def now(cls, arguments: Any, model: nn.Module | None = None) -> LoopSettings:
        """Return what is in force now, for a model with these arguments."""
        tensors: Iterable[Any] = (*tree_leaves(arguments), *(() if model is None else model.parameters()))
        device = next((value.device.type for value in tensors if isinstance(value, Tensor)), "cpu")
        return cls(device, autocast_now(device))

    def restored(self) -> AbstractContextManager[object]:
        """Return a context with the loop's autocast, unless autocast is on already."""
        if self.autocast is None or autocast_now(self.device) is not None:
            return nullcontext()
        return computing_in(self.autocast, self.device)

    def apply(self, path: str, flow: Flow) -> Flow:
        """Return the flow into a site as the loop computes it, where that was seen.

        FSDP2's mixed precision converts the weights themselves, which are wider as long as the model does not run.
        """
        seen = self.sites.get(path)
        if seen is None:
            return flow
        setting = flow.setting
        dtype = seen.dtype if seen.autocast is None and setting.autocast is None else setting.dtype
        return replace(
            flow, setting=replace(setting, dtype=dtype, channels_last=setting.channels_last or seen.channels_last)
        )


class LoopWatch:
    """Records the settings at the next forward passes of a model, for a loop in which nothing else is recorded."""

    def __init__(self) -> None:
        self.settings: LoopSettings | None = None
        self._handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Watch a model from its next call on; one that is compiled in place is left alone, for its hooks are compiled."""
        self.remove()
        if COMPILED not in model.__dict__ or model.__dict__[COMPILED] is None:
            self._handle = model.register_forward_pre_hook(self._record, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off; what was recorded stays."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _record(self, model: nn.Module, arguments: Any, named: Any) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.settings = LoopSettings.now((arguments, named), model)


def warn_of_full_precision(flows: Iterable[Flow]) -> None:
    """Warn if sites on CUDA will be timed in float32 without TF32, where nothing shows that the loop computes so."""
    if has_tf32():
        return
    settings = [flow.setting for flow in flows]
    if any(each.device_type == "cuda" and each.computes_in is torch.float32 for each in settings):
        warnings.warn(
            "The layers are timed in float32 without TF32, because no autocast is in force where the plan is made, and most "
            "trainings on CUDA use either. If yours does, make the plan inside of its autocast, pass "
            "Policy(cost=tdfx.Measured(autocast=torch.bfloat16)), or call torch.set_float32_matmul_precision('high') first.",
            TdfxWarning,
            stacklevel=4,
        )

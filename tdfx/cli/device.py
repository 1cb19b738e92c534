"""Build a model on a device, also on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter

from tdfx.errors import ModelReferenceError, TdfxError, first_line


def parse_device(text: str) -> torch.device:
    """Return an available device: cpu, cuda, cuda:1 and so on, or meta, whose tensors have shapes but no values.

    Raises:
        TdfxError: There is no such device, or this machine does not have it.
    """
    try:
        device = torch.device(text)
        if device.type != "meta":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # another class for each device
        raise TdfxError(
            f"--device {text!r} cannot be used: this machine and its PyTorch have {', '.join(_devices())}. Take one of "
            f"these, or meta, which needs no memory and knows no values."
        ) from error
    return device


def _devices() -> list[str]:
    """Return the devices that can compute, as one names them."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    assert kind is not None
    return ["cpu", *(f"{kind.type}:{index}" for index in range(count))]


def build_on(device: torch.device, reference: str, build: Callable[[str], nn.Module]) -> nn.Module:
    """Build a model on a device, without weights on the meta device; raise ModelReferenceError if it does not fit."""
    if device.type == "cpu":
        return build(reference)
    if device.type == "meta":
        return _build_empty(reference, build)
    model = build(reference)
    try:
        return model.to(device)
    except RuntimeError as error:  # out of memory, among others
        raise ModelReferenceError(
            f"{reference!r} could not be moved to {str(device)!r}: {first_line(error)}. Take another --device."
        ) from error


def _build_empty(reference: str, build: Callable[[str], nn.Module]) -> nn.Module:
    """Build a model and move each parameter to the meta device as soon as it is registered, before it is initialized.

    Other tensors keep their values, so a model can compute with them while it is built, as RegNet computes its widths. Under
    ``torch.device("meta")`` it could not.
    """
    # The type of a hook allows no return value, but torch documents that a returned parameter is registered.
    hook = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
    try:
        return build(reference).to("meta")
    except ModelReferenceError as error:
        raise ModelReferenceError(
            f"{error} If it can be built on the CPU, it may need values that the meta device does not have: leave out "
            f"--device meta."
        ) from error
    finally:
        hook.remove()


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Return a parameter without values, or None to register an uninitialized parameter as it is."""
    if isinstance(parameter, UninitializedParameter) or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

"""Where the model is built and its layers are timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter

from tdfx.errors import ModelReferenceError, TdfxError, first_line


def parse_device(text: str) -> torch.device:
    """Return a device that is there: cpu, cuda, cuda:1 and so on, or meta, on which tensors have shapes and no values.

    Raises:
        TdfxError: There is no such device, or not here.
    """
    try:
        device = torch.device(text)
        if device.type != "meta":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own differ by device
        raise TdfxError(
            f"--device {text!r} cannot be used here: {first_line(error)}. Take cpu, a device that this machine has, or "
            f"meta, which needs no memory."
        ) from error
    return device


def build_on(device: torch.device, reference: str, build: Callable[[str], nn.Module]) -> nn.Module:
    """Build a model on a device; on the meta device its values are never made.

    Raises:
        ModelReferenceError: It cannot be built, or does not fit there.
    """
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
    """Build a model whose parameters go to the meta device as soon as each is made, before it is filled.

    What a model computes to be built, such as RegNet its widths, is computed; under ``torch.device("meta")`` it could not
    be.
    """
    # The annotation knows only hooks that return nothing; one that returns a parameter puts it in place, as documented.
    hook = register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]
    try:
        return build(reference).to("meta")
    except ModelReferenceError as error:
        raise ModelReferenceError(
            f"{error} If it can be built on the CPU, it may need values that the meta device does not have: leave out "
            f"--device meta."
        ) from error
    finally:
        hook.remove()


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """Return a parameter without values; None for one without a shape yet, which is left as it is."""
    if isinstance(parameter, UninitializedParameter) or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

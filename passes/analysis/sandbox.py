"""Running a user's model without a trace: copies to run, the random generators, and warnings."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tdfx.devices import random_streams_kept
from tdfx.layers.copying import structural_copy
from tdfx.layers.module_state import HOOKS
from tdfx.passes.analysis.process_settings import settings_kept
from tdfx.passes.analysis.user_state import UserState


@contextmanager
def isolated(module: nn.Module, *, traces: bool = False, base: UserState | None = None) -> Iterator[UserState]:
    """Silence warnings, and restore what its code can change: random generators, all that it keeps, settings.

    With ``traces``, draws from iterators that it keeps raise UnsafeCodeError. Of torch's generators it restores that of the
    CPU and those of the devices that hold the module. A ``base`` that was saved before is put back, too.
    Yields what was saved.
    """
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    state = UserState(module, base=base)
    try:
        with warnings.catch_warnings(action="ignore"), random_streams_kept(devices), settings_kept():
            state.lend_iterators(refuse=traces)
            yield state
    finally:
        state.restore()
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def random_states() -> tuple[object, ...]:
    """Return the states of the random generators of torch (CPU), Python and NumPy, to be compared."""
    _, keys, *rest = np.random.get_state(legacy=True)
    return torch.random.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), rest


def scratch_copy(module: nn.Module, *, training: bool) -> nn.Module:
    """Return a structural copy to run or trace: in the given mode, and with buffers of its own.

    The copy also owns the parameters that a lazy layer materializes at its first run. The mode is set on each submodule
    by itself, because a user's own ``train`` may change the tensors that the copy shares.
    """
    scratch = structural_copy(module)
    buffers: dict[int, Tensor] = {}
    for submodule in scratch.modules():
        submodule.training = training
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = buffers.setdefault(id(buffer), _clone_buffer(buffer))
        for name, parameter in submodule._parameters.items():
            if isinstance(parameter, UninitializedParameter):
                submodule._parameters[name] = copy.deepcopy(parameter)
    return scratch


def _clone_buffer(buffer: Tensor) -> Tensor:
    if isinstance(buffer, UninitializedBuffer):
        lazy: Tensor = UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
        return lazy
    return buffer.clone()


def clone_parameters(scratch: nn.Module) -> dict[int, int]:
    """Give a scratch copy parameters of its own, and return which parameter each is a clone of, both by identity."""
    clones: dict[int, nn.Parameter] = {}
    for submodule in scratch.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None and not isinstance(parameter, UninitializedParameter):
                if id(parameter) not in clones:
                    clones[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                submodule._parameters[name] = clones[id(parameter)]
    return {id(clone): original for original, clone in clones.items()}


def remove_hooks(scratch: nn.Module, *, backward_only: bool = False) -> None:
    """Remove the user's hooks from a scratch copy, so that they see no Proxy and no gradient but those of the training."""
    for submodule in scratch.modules():
        for name in HOOKS:
            hooks = submodule.__dict__[name]
            if hasattr(hooks, "clear") and ("backward" in name or not backward_only):
                submodule.__dict__[name] = type(hooks)()

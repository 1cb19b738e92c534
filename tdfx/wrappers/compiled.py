"""How a model and its submodules were compiled by ``torch.compile``, and how another model is compiled in the same way.

A module is compiled wrapped, ``torch.compile(module)``, or in place, ``module.compile()``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from tdfx.errors import TdfxWarning
from tdfx.layers.copying import copy_hooks, replace_modules, structural_copy
from tdfx.layers.module_state import COMPILED
from tdfx.wrappers.compile_limit import allow_variants

Recompile = Callable[[Any], Any]
"""Compiles a module, or a module's call function, with the settings that another module was compiled with."""


@dataclass(frozen=True, slots=True)
class CompiledParts:
    """The compiled submodules of a model by their paths, in which ``_orig_mod`` is left out."""

    in_place: dict[str, Recompile]
    """Path of a module that is compiled in place -> its settings. The model itself may be among them."""
    wrapped: dict[str, Any]
    """Path of a submodule that is wrapped -> its outermost wrapper."""

    @classmethod
    def of(cls, model: nn.Module) -> CompiledParts:
        """Find the compiled parts of a model that is not itself wrapped."""
        in_place: dict[str, Recompile] = {}
        wrapped: dict[str, Any] = {}
        for full_path, module in model.named_modules(remove_duplicate=False):
            path = ".".join(name for name in full_path.split(".") if name != "_orig_mod")
            if is_wrapped(module):
                wrapped.setdefault(path, module)
            elif (recompile := compile_settings_of(module, path)) is not None:
                in_place[path] = recompile
        return cls(in_place, wrapped)

    def unwrap_parts(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model in which wrapped parts are compiled in place; the model itself if none is wrapped."""
        if not self.wrapped:
            return model
        copy = structural_copy(model)
        replace_modules(copy, {module: inner_module(module) for module in copy.modules() if is_wrapped(module)})
        self.compile_in_place(copy)
        return copy

    def compile_in_place(self, copy: nn.Module) -> None:
        """Compile every part in place in a copy without wrappers, so that the passes see that it is compiled."""
        wrapped = {path: wrapper.dynamo_ctx for path, wrapper in self.wrapped.items()}
        for path, recompile in (self.in_place | wrapped).items():
            compile_in_place(copy.get_submodule(path), recompile)

    def recompile(self, model: nn.Module) -> nn.Module:
        """Compile the same parts of another model, in place or wrapped as they were, and return that model."""
        modules = dict(model.named_modules(remove_duplicate=False))
        allow_variants(modules[path] for path in (self.in_place | self.wrapped) if path in modules)
        for path, recompile in self.in_place.items():
            if path in modules:
                compile_in_place(modules[path], recompile)
        new_wrappers: dict[int, nn.Module] = {}
        # Innermost first, so that a wrapper takes a module whose own parts are wrapped already.
        for path, wrapper in sorted(self.wrapped.items(), key=lambda item: len(item[0]), reverse=True):
            if path in modules:
                if id(wrapper) not in new_wrappers:
                    new_wrappers[id(wrapper)] = wrap_compiled(wrapper, modules[path])
                owner, _, name = path.rpartition(".")
                modules[owner]._modules[name] = new_wrappers[id(wrapper)]
        return model


def is_wrapped(module: nn.Module) -> bool:
    """Return True for a module that ``torch.compile(module)`` returned."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def wrap_compiled(wrapper: Any, module: nn.Module) -> nn.Module:
    """Wrap a module by ``torch.compile`` with the settings and the hooks of another wrapper."""
    compiled: nn.Module = wrapper.dynamo_ctx(module)
    copy_hooks(wrapper, compiled)
    return compiled


def compile_settings_of(module: nn.Module, path: str = "") -> Recompile | None:
    """Return the settings of a module that was compiled in place; None for others. A warning names it by its path."""
    code = module.__dict__.get(COMPILED)
    if code is None:
        return None
    if isinstance(code, MethodType) and code.__self__ is module:  # compile(disable=True)
        return lambda call: call
    for cell in code.__closure__ or () if isinstance(code, FunctionType) else ():
        with suppress(ValueError):  # an empty cell: the name was never assigned
            if isinstance(cell.cell_contents, torch._dynamo.eval_frame._TorchDynamoContext):
                return cast("Recompile", cell.cell_contents)
    warnings.warn(
        f"{'Part ' + repr(path) if path else 'The model'} was compiled in place in a way that tdfx does not know, so it "
        f"comes back uncompiled. Call its compile() again.",
        TdfxWarning,
        stacklevel=5,
    )
    return None


def compile_in_place(module: nn.Module, recompile: Recompile | None) -> None:
    """Compile a module in place, as ``module.compile()`` does; the compiler runs at the first call."""
    if recompile is not None:
        module.__dict__[COMPILED] = recompile(module._call_impl)


def seconds_spent_compiling() -> float:
    """Return how long ``torch.compile`` has worked in this process so far: about what compiling a rewritten model takes."""
    return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])


def inner_module(module: nn.Module) -> nn.Module:
    """Return the module inside one or several nested wrappers."""
    while is_wrapped(module):
        module = cast("nn.Module", module._modules["_orig_mod"])
    return module

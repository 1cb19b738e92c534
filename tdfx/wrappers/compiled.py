"""What torch.compile has made of a model and of its parts, and the same made again of another model.

A module can be compiled in two ways: wrapped, ``torch.compile(module)``, or in place, ``module.compile()``. Either leaves
code for that very module behind, and the settings with it, by which other modules are compiled as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from tdfx.errors import TdfxWarning
from tdfx.layers.copying import COMPILED, HOOKS, put_in_place, structural_copy

Recompile = Callable[[Any], Any]
"""Compiles a module, or the function by which one is called, with the settings of another."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """The parts of a model that are compiled by themselves, by their paths as if none was wrapped."""

    in_place: dict[str, Recompile]
    wrapped: dict[str, nn.Module]
    """The wrappers around parts; the model itself is none."""

    @classmethod
    def of(cls, model: nn.Module) -> Compiled:
        """Look for all compiled parts of a model, itself included where it is compiled in place."""
        in_place: dict[str, Recompile] = {}
        wrapped: dict[str, nn.Module] = {}
        for path, one in _named(model):
            if is_wrapped(one):
                wrapped.setdefault(path, one)
            elif (again := compile_settings_of(one, path)) is not None:
                in_place[path] = again
        return cls(in_place, wrapped)

    def plain(self, model: nn.Module) -> nn.Module:
        """Return a model whose parts are in no wrappers but compiled in place: itself where none are wrapped, or a copy."""
        if not self.wrapped:
            return model
        made = structural_copy(model)
        put_in_place(made, {one: _inner(one) for one in made.modules() if is_wrapped(one)})
        self.mark(made)
        return made

    def mark(self, copy: nn.Module) -> None:
        """Compile in place what is compiled in the model of which this is a plain copy, so that it is seen there too."""
        for path, again in (self.in_place | {path: _settings(one) for path, one in self.wrapped.items()}).items():
            compile_in_place(copy.get_submodule(path), again)

    def again(self, made: nn.Module) -> nn.Module:
        """Compile the parts of another model as those of this one are, in place of what they are; and return it."""
        modules = dict(made.named_modules(remove_duplicate=False))
        for path, again in self.in_place.items():
            if path in modules:
                compile_in_place(modules[path], again)
        done: dict[int, nn.Module] = {}
        # Innermost first, so that what a wrapper holds is complete.
        for path in sorted(self.wrapped, key=len, reverse=True):
            if path in modules:
                owner, _, name = path.rpartition(".")
                inside = modules[path]
                wrapper = self.wrapped[path]
                if id(wrapper) not in done:
                    done[id(wrapper)] = wrap_compiled(wrapper, inside)
                modules[owner]._modules[name] = done[id(wrapper)]
        return made


def is_wrapped(module: nn.Module) -> bool:
    """Return True for what ``torch.compile`` makes of a module."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def wrap_compiled(wrapper: nn.Module, made: nn.Module) -> nn.Module:
    """Compile another module with the settings, and the hooks, of one that is wrapped."""
    found = cast("nn.Module", _settings(wrapper)(made))
    for name in HOOKS:
        value = wrapper.__dict__[name]
        found.__dict__[name] = value.copy() if hasattr(value, "copy") else value
    return found


def compile_settings_of(module: nn.Module, path: str = "") -> Recompile | None:
    """Return what compiles another module as this one was in place; None where it was not.

    Args:
        module: It is not changed.
        path: What a warning calls it.
    """
    code = module.__dict__.get(COMPILED)
    if code is None:
        return None
    if isinstance(code, MethodType) and code.__self__ is module:  # compile(disable=True)
        return lambda call: call
    for cell in code.__closure__ or () if isinstance(code, FunctionType) else ():
        with suppress(ValueError):  # a name that was never given a value
            if isinstance(cell.cell_contents, torch._dynamo.eval_frame._TorchDynamoContext):
                return cast("Recompile", cell.cell_contents)
    warnings.warn(
        f"{'Part ' + repr(path) if path else 'The model'} was compiled in place in a way that tdfx does not know, so it "
        f"comes back uncompiled. Call its compile() again.",
        TdfxWarning,
        stacklevel=5,
    )
    return None


def compile_in_place(module: nn.Module, again: Recompile | None) -> None:
    """Compile a module in place, as ``module.compile()`` does; nothing runs before it is called."""
    if again is not None:
        module.__dict__[COMPILED] = again(module._call_impl)


def _named(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules by their paths as if none was wrapped; a wrapper has that of what it holds, and comes before it."""
    yield path, module
    if is_wrapped(module):
        yield from _named(cast("nn.Module", module._orig_mod), path)
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _named(child, f"{path}.{name}" if path else name)


def _inner(module: nn.Module) -> nn.Module:
    """Return what is in a wrapper, or in several."""
    while is_wrapped(module):
        module = cast("nn.Module", module._modules["_orig_mod"])
    return module


def _settings(wrapper: nn.Module) -> Recompile:
    return cast("Recompile", wrapper.dynamo_ctx)

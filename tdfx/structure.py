"""Copying the structure of a model while sharing its tensors."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""The attributes in which a module keeps the hooks of its calls."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def structural_copy(model: ModuleT, replace: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Copy every module of a model and no tensor: parameters and buffers are the same objects in both.

    Class, attributes, hooks, names and their order, and the train or eval state of each submodule are kept. Containers
    held as attributes are copied, and what they say of a submodule (a list of layers, a bound method) says it of the
    copy. TorchScript modules cannot be taken apart and are shared.

    Args:
        model: Any module; it is left as it was.
        replace: Submodule -> the module to stand in its place, at every path where it occurs.

    Returns:
        The copy, or what ``replace`` says of the root.
    """
    twins: dict[int, nn.Module] = {}
    fresh: list[tuple[nn.Module, nn.Module]] = []
    for old in _modules_outside(model, replace or {}):
        if replace is not None and old in replace:
            twins[id(old)] = replace[old]
        elif isinstance(old, torch.jit.ScriptModule):
            twins[id(old)] = old
        else:
            twins[id(old)] = object.__new__(type(old))
            fresh.append((old, twins[id(old)]))
    for old, new in fresh:
        for key, value in old.__dict__.items():
            new.__dict__[key] = _translate(value, twins)
    return twins[id(model)]


def shell_of(module: ModuleT) -> ModuleT:
    """Return a copy of one module with placeholders of no memory for its parameters, to build the real one from later.

    The placeholders keep shape, dtype and ``requires_grad``, on the meta device.
    """
    shell = cast("ModuleT", structural_copy(module))
    for name, parameter in shell._parameters.items():
        if parameter is not None:
            meta = torch.empty_like(parameter, device="meta")
            shell._parameters[name] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    return shell


def _modules_outside(model: nn.Module, replace: Mapping[nn.Module, nn.Module]) -> Iterator[nn.Module]:
    """Yield each module once, without looking into those that will be replaced."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        if module not in replace:
            waiting.extend(child for child in module._modules.values() if child is not None)


def _translate(value: object, twins: Mapping[int, nn.Module]) -> object:
    """Return an attribute's value with every module of the original model replaced by its twin."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if type(value) is functools.partial:
        arguments = [_translate(one, twins) for one in value.args]
        named = {key: _translate(one, twins) for key, one in value.keywords.items()}
        return functools.partial(cast("types.FunctionType", _translate(value.func, twins)), *arguments, **named)
    if type(value) in {list, tuple, set}:
        return type(value)(_translate(one, twins) for one in value)  # type: ignore[call-arg, attr-defined]
    if isinstance(value, dict):
        # A shallow copy keeps subclasses such as OrderedDict and defaultdict; then each value is translated in place.
        copied = value.copy()
        for key, one in value.items():
            copied[key] = _translate(one, twins)
        return copied
    return value

"""Copying the structure of a model while sharing its tensors."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tdfx.layers.placement import placeholder

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

MODULE_STATE = frozenset(nn.Module().__dict__)
"""The attributes in which every module keeps its own state: parameters, buffers, children, hooks, mode."""

COMPILED = "_compiled_call_impl"
"""What ``module.compile()`` leaves: code for the module that it was called on, and for no copy of it."""

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def structural_copy(model: ModuleT, replace: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Copy every module of a model and no tensor: parameters and buffers are the same objects in both.

    Class, attributes, hooks, names and their order, and the train or eval state of each submodule are kept. Containers
    held as attributes are copied, and what they say of a submodule (a list of layers, a bound method) says it of the
    copy; so does a function that closes over one. Code from ``compile()`` is left behind. TorchScript modules cannot be
    taken apart and are shared.

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
    translator = _Translator(twins)
    for old, new in fresh:
        new.__dict__.update({key: translator(value) for key, value in old.__dict__.items() if key != COMPILED})
    return twins[id(model)]


def rebind(model: nn.Module, *former: nn.Module) -> None:
    """Make what the modules of a model hold of ``body`` (bound methods, hooks, closures) hold the model itself."""
    now = dict(model.named_modules(remove_duplicate=False))
    twins = {
        id(old): now[path]
        for one in former
        for path, old in one.named_modules(remove_duplicate=False)
        if path in now and now[path] is not old
    }
    translator = _Translator(twins)
    held = [(one, dict(one.__dict__)) for one in model.modules()]  # alive until the handles of hooks are moved too
    for one, attributes in held:
        for key, value in attributes.items():
            if key not in {"_parameters", "_buffers", "_modules"}:
                one.__dict__[key] = translator(value)


def put_in_place(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Let the modules of a model hold others in the place of some of theirs, wherever they speak of them."""
    translator = _Translator({id(old): new for old, new in others.items()})
    held = [(one, dict(one.__dict__)) for one in model.modules()]
    for one, attributes in held:
        one.__dict__.update({key: translator(value) for key, value in attributes.items()})


def shell_of(module: ModuleT) -> ModuleT:
    """Return a copy of one module with placeholders of no memory for its parameters, to build the real one from later.

    The placeholders keep shape, dtype and ``requires_grad``, on the meta device.
    """
    shell = cast("ModuleT", structural_copy(module))
    for name, parameter in shell._parameters.items():
        if parameter is not None:
            shell._parameters[name] = nn.Parameter(placeholder(parameter), requires_grad=parameter.requires_grad)
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


class _Translator:
    """Copies the value of an attribute so that every module of the original model in it becomes its twin.

    Containers are copied, each once, so that two attributes that hold one list hold one list again. Objects of a user's
    own classes, other than containers, are shared.
    """

    def __init__(self, twins: Mapping[int, nn.Module]) -> None:
        self.twins = twins
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.twins.get(id(value), value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self.twins:
            return types.MethodType(value.__func__, self.twins[id(value.__self__)])
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, RemovableHandle):
            return self._handle(value)
        if not isinstance(value, (dict, list, tuple, set, frozenset, deque, functools.partial)):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = self._container(value)
        return self.done[id(value)]

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """Bind a function that closes over a module, as a lambda made in a constructor does, to the twin."""
        cells = value.__closure__ or ()
        try:
            contents = [cell.cell_contents for cell in cells]
        except ValueError:  # a name that was never given a value
            return value
        if not any(isinstance(one, nn.Module) and id(one) in self.twins for one in contents):
            return value
        closure = tuple(types.CellType(self(one)) for one in contents)
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
        made.__kwdefaults__ = value.__kwdefaults__
        made.__dict__.update(value.__dict__)
        return made

    def _handle(self, value: RemovableHandle) -> RemovableHandle:
        """Let a handle that a module holds take the hook off the twin, and not off the original."""
        made = copy.copy(value)
        made.hooks_dict_ref, *extra = (
            weakref.ref(self(hooks)) if (hooks := reference()) is not None else reference
            for reference in (value.hooks_dict_ref, *value.extra_dict_ref)
        )
        made.extra_dict_ref = tuple(extra)
        return made

    def _container(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            named = {key: self(one) for key, one in value.keywords.items()}
            return type(value)(self(value.func), *map(self, value.args), **named)
        if isinstance(value, (tuple, frozenset)):
            items = [self(one) for one in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self._mutable(value)

    def _mutable(self, value: Any) -> Any:
        """Copy first and fill afterwards, so that a container may hold itself; subclasses keep what else they hold."""
        copied = self.done[id(value)] = _shallow_copy(value)
        if isinstance(value, dict):
            # By the base class's methods, because a subclass may refuse to be changed.
            base = OrderedDict if isinstance(value, OrderedDict) else dict
            items = [(self(key), self(one)) for key, one in base.items(value)]
            base.clear(copied)
            for key, one in items:
                base.__setitem__(copied, key, one)
        elif isinstance(value, list):
            list.__setitem__(copied, slice(None), [self(one) for one in value])
        else:
            contents = [self(one) for one in value]
            copied.clear()
            (copied.update if isinstance(value, set) else copied.extend)(contents)
        return copied


def _shallow_copy(value: Any) -> Any:
    """Copy a container with its class; a subclass of dict comes back empty, since it may refuse to be filled."""
    if not isinstance(value, dict) or hasattr(type(value), "__copy__"):
        return copy.copy(value)
    made = type(value).__new__(type(value))
    if hasattr(value, "__dict__"):
        made.__dict__.update(value.__dict__)
    return made

"""Translates what attributes of a model hold into what a copy of the model holds in their place."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.utils.hooks import RemovableHandle

from tdfx.layers.holders import referent
from tdfx.layers.module_state import HOOKS, MODULE_STATE, slots_of
from tdfx.layers.reach import CONTAINERS, is_full, reach_of

_ATOMS = frozenset({bool, int, float, str, type(None), nn.Parameter, torch.Tensor})
"""Classes whose instances are the same in a copy, most of what modules hold: looked up before anything else."""


class Translator:
    """Translates the value of an attribute: modules of the original become their twins, also deep inside the value.

    Containers are copied, each once, so that two attributes which hold the same list still hold the same list; so are the
    objects of a user's own classes that hold layers. What else an attribute refers to is shared (``Reach``).
    """

    def __init__(
        self, twins: Mapping[int, nn.Module], modules: Iterable[nn.Module] = (), root: nn.Module | None = None
    ) -> None:
        self.twins = twins
        """Module of the original, by id -> its twin."""
        self.copies: dict[int, Any] = {}
        """Container, function or object of the original, by id -> its copy."""
        modules = list(modules)
        attributes = [module.__dict__[name] for module in modules for name in module.__dict__.keys() - MODULE_STATE]
        hooks = [module.__dict__[name] for module in modules for name in HOOKS]
        self.reach = reach_of(attributes, hooks, twins, id(root), {type(module) for module in modules})
        """What the model holds: whatever refers to a container or an object that is copied gets the copy."""

    def __call__(self, value: Any) -> Any:
        """Return what a copy holds in the place of a value: the value itself, if it refers to nothing that is copied."""
        if type(value) in _ATOMS:
            return value
        if type(value) in weakref.ProxyTypes:
            target = referent(value)
            return weakref.proxy(self.twins[id(target)]) if id(target) in self.twins else value
        if isinstance(value, nn.Module):
            return self.twins.get(id(value), value)
        if isinstance(value, types.MethodType):
            bound = self(value.__self__) if self._is_copied(value.__self__) else value.__self__
            return value if bound is value.__self__ else types.MethodType(value.__func__, bound)
        if isinstance(value, types.BuiltinMethodType):
            return getattr(self(value.__self__), value.__name__) if self._is_copied(value.__self__) else value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, RemovableHandle):
            return self._handle(value)
        if isinstance(value, weakref.ref):
            return self._weak_reference(value)
        if isinstance(value, _WrappedHook):
            return self._module_hook(value)
        if id(value) in self.reach.owned:
            return self._object(value)
        if not isinstance(value, (dict, list, tuple, set, frozenset, deque, functools.partial)):
            return value
        if id(value) in self.reach.shared:
            return value
        if id(value) not in self.copies:
            self.copies[id(value)] = self._container(value)
        return self.copies[id(value)]

    def fill(self, new: Any, old: Any) -> None:
        """Give a new object the translated attributes of an old one."""
        if hasattr(old, "__dict__"):
            new.__dict__.update({key: self(value) for key, value in old.__dict__.items()})
        for name, slot in slots_of(type(old)):
            if hasattr(old, name):
                slot.__set__(new, self(getattr(old, name)))

    def _is_copied(self, value: Any) -> bool:
        return id(value) in self.twins or id(value) in self.reach.held or id(value) in self.reach.owned

    def _object(self, value: Any) -> Any:
        if id(value) not in self.copies:
            kind: Any = type(value)
            self.copies[id(value)] = kind.__new__(kind)  # before it is filled: it may refer to itself
            self.fill(self.copies[id(value)], value)
        return self.copies[id(value)]

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Return a function that closes over a twin, or has it as a default, where that was a module.

        The cells of other names stay the same, so that functions that share a name go on sharing it.
        """
        if id(function) not in self.copies:
            self.copies[id(function)] = function  # which it may close over itself
            cells = function.__closure__ or ()
            closure = tuple(map(self._cell, cells))
            defaults, named = map(self._bound_parts, (function.__defaults__, function.__kwdefaults__))
            is_same = all(new is old for new, old in zip(closure, cells, strict=True))  # equal cells may be two
            if not is_same or defaults is not function.__defaults__ or named is not function.__kwdefaults__:
                self.copies[id(function)] = _with_parts(function, closure, defaults, named)
        return self.copies[id(function)]  # type: ignore[no-any-return]

    def _bound_parts(self, values: Any) -> Any:
        """Translate the default arguments of a function: a tuple, a dict, or None; the same object if none changes."""
        if values is None:
            return None
        old = list(values.values() if isinstance(values, dict) else values)
        new = list(map(self._bound, old))
        if all(now is before for now, before in zip(new, old, strict=True)):
            return values
        return dict(zip(values, new, strict=True)) if isinstance(values, dict) else tuple(new)

    def _cell(self, cell: types.CellType) -> types.CellType:
        if not is_full(cell):
            return cell
        if id(cell) not in self.copies:
            new = self._bound(cell.cell_contents)
            self.copies[id(cell)] = cell if new is cell.cell_contents else types.CellType(new)
        return self.copies[id(cell)]  # type: ignore[no-any-return]

    def _handle(self, handle: RemovableHandle) -> RemovableHandle:
        """Return a handle whose ``remove()`` takes the hook off the twin, and not off the original."""
        twin = type(handle).__new__(type(handle))
        twin.__dict__.update(handle.__dict__)  # by copy.copy, torch fails where what a handle refers to is gone
        twin.hooks_dict_ref, *extra = (
            weakref.ref(self(hooks)) if (hooks := reference()) is not None else reference
            for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref)
        )
        twin.extra_dict_ref = tuple(extra)
        return twin

    def _weak_reference(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        """Return a weak reference to the twin, where it refers to a module or to a module's bound method."""
        target = reference()
        if isinstance(reference, weakref.WeakMethod):
            return reference if (method := self(target)) is target else weakref.WeakMethod(method)
        return weakref.ref(self.twins[id(target)]) if id(target) in self.twins else reference

    def _module_hook(self, hook: _WrappedHook) -> _WrappedHook:
        """Return a hook that passes the twin to the user's function: torch wraps hooks that are given their module."""
        module = hook.module() if hook.with_module else None
        return _WrappedHook(self(hook.hook), None if module is None else self(module))

    def _container(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            named = {key: self._bound(argument) for key, argument in value.keywords.items()}
            return type(value)(self(value.func), *map(self._bound, value.args), **named)
        if isinstance(value, (tuple, frozenset)):
            items = [self(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return self._mutable(value)

    def _bound(self, value: Any) -> Any:
        """Translate what a function is bound to; a container that no module holds, and that holds none, is shared."""
        if id(value) in self.reach.held or not isinstance(value, CONTAINERS):
            return self(value)
        return self(value) if id(value) in self.reach.inside else value

    def _mutable(self, value: Any) -> Any:
        """Copy a mutable container and translate its items; a subclass keeps its own attributes."""
        # Recorded before it is filled, because a container may hold itself.
        copied = self.copies[id(value)] = _shallow_copy(value)
        if isinstance(value, dict):
            # By the methods of dict, because a subclass may refuse changes in its own.
            base = OrderedDict if isinstance(value, OrderedDict) else dict
            items = [(self(key), self(item)) for key, item in base.items(value)]
            base.clear(copied)
            for key, item in items:
                base.__setitem__(copied, key, item)
            if isinstance(value, defaultdict):
                copied.default_factory = self(value.default_factory)
        elif isinstance(value, list):
            list.__setitem__(copied, slice(None), [self(item) for item in value])
        else:
            contents = [self(item) for item in value]
            copied.clear()
            (copied.update if isinstance(value, set) else copied.extend)(contents)
        return copied


def _with_parts(
    function: types.FunctionType, closure: tuple[types.CellType, ...], defaults: Any, keyword_defaults: Any
) -> types.FunctionType:
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
    made.__kwdefaults__ = keyword_defaults
    made.__dict__.update(function.__dict__)
    return made


def _shallow_copy(value: Any) -> Any:
    """Copy a container; a dict comes back empty, since ``copy.copy`` would call methods by which a subclass may refuse."""
    if not isinstance(value, dict) or hasattr(type(value), "__copy__"):
        return copy.copy(value)
    copied = type(value).__new__(type(value))
    if hasattr(value, "__dict__"):
        copied.__dict__.update(value.__dict__)
    return copied

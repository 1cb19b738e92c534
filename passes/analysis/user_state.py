"""What a user's forward may keep beside its buffers: saved before a run and put back, so that looking leaves no trace."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tdfx.layers.holders import referent
from tdfx.layers.module_state import HOOKS, MODULE_STATE, slots_of
from tdfx.passes.analysis.iterators import (
    RecordingIterator,
    RefusingIterator,
    ReplayingIterator,
    copy_of,
    is_iterator,
    parts_of,
    put_back,
)
from tdfx.passes.analysis.libraries import is_foreign, is_of_library, keeps_state
from tdfx.passes.analysis.saved_values import (
    CACHE,
    differ,
    empty_again,
    empty_slot,
    fresh_cache,
    holds_same,
    is_plain,
    refill,
    refill_dict,
    refill_set,
    remove_names,
    restore_class,
    saved_contents,
)

_MOST_OBJECTS = 100_000
"""So many objects are looked at; a trainer or a data set behind an attribute may hold millions."""
_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)

Action = Callable[[], object]


class UserState:
    """The contents of every object that the code of a module can reach and change.

    These are the attributes of its modules and of their classes, containers, arrays, tensors, random generators and objects
    of a user's own classes, however deep; and the names of files and outer functions that the code of a forward names.
    What its code calls besides, such as hooks, may be given as ``others``. What a ``base`` has saved is not saved again,
    but put back with the rest; it must not have changed since.
    """

    def __init__(self, module: nn.Module, *others: Any, base: UserState | None = None) -> None:
        self.contents: dict[str, Any] = {}
        """Where an object was found -> what it held, for a comparison."""
        self.functions: list[tuple[str, types.FunctionType]] = []
        """The user's functions that the code can reach, each with the name of what holds it."""
        self._undo: list[Action] = []
        self._changes: list[tuple[str, Callable[[], bool]]] = []
        """Where an object was found, and whether it has changed since."""
        self._iterators: list[tuple[Any, Callable[[Any], object]]] = []
        self._base = base
        self._lent: dict[int, Any] = base._lent if base else {}
        self._own = frozenset(id(tensor) for tensor in (*module.parameters(), *module.buffers()))
        self._seen: set[int] = {*self._own, *(base._seen if base else ())}
        self._alive: list[Any] = []
        self._names_of_files: dict[tuple[int, bool], set[str]] = {}
        self._waiting: deque[tuple[str, Any]] = deque()
        for path, submodule in module.named_modules():
            self._waiting.append((path, submodule))
        self._waiting.extend(("", each) for each in others)
        most = len(self._seen) + _MOST_OBJECTS
        while self._waiting and len(self._seen) < most:
            self._visit(*self._waiting.popleft())

    @property
    def iterators(self) -> list[Any]:
        """The iterators that the code can reach."""
        return [iterator for iterator, _ in self._iterators if not isinstance(iterator, CACHE)]

    def lend_iterators(self, *, refuse: bool = False) -> None:
        """Let the code use copies of its iterators and caches until ``restore``, because they cannot be set back.

        With ``refuse``, draws from them raise UnsafeCodeError.
        """
        if self._base is not None:
            self._base.lend_iterators(refuse=refuse)
        for iterator, store in self._iterators:
            if isinstance(iterator, CACHE):
                self._lent.setdefault(id(iterator), fresh_cache(iterator))
            elif id(iterator) not in self._lent:
                self._lent[id(iterator)] = RefusingIterator() if refuse else copy_of(iterator)
            store(self._lent[id(iterator)])

    def wrap_iterators(self) -> None:
        """Put iterators in the place of those that cannot be copied, such as a generator that has begun.

        They give the same values, and again those that are drawn from them while the model is looked at.
        """
        wrapped: dict[int, Any] = {}
        for iterator, store in self._iterators:
            if isinstance(iterator, CACHE | ReplayingIterator):
                continue
            if isinstance(copy_of(iterator), RecordingIterator):
                store(wrapped.setdefault(id(iterator), ReplayingIterator(iterator)))

    def changed(self) -> str | None:
        """Return where something was found that has changed since, iterators and caches aside; None if nothing has."""
        found = (path for path, has_changed in self._changes if has_changed())
        return next(found, None if self._base is None else self._base.changed())

    def restore(self) -> None:
        """Put everything back that has changed since."""
        for undo in self._undo:
            undo()
        for iterator, _ in self._iterators:
            put_back(iterator, self._lent.get(id(iterator)))
        if self._base is not None:
            self._base.restore()
        self._lent.clear()

    def _visit(self, path: str, value: Any) -> None:
        if isinstance(value, weakref.ref) or type(value) in weakref.ProxyTypes:
            value = referent(value)
        if isinstance(value, type):
            if not is_foreign(sys.modules.get(value.__module__)):  # libraries have thousands that nobody changes
                self._visit_class(value)
            return
        if isinstance(value, (*_ATOMS, torch.jit.ScriptModule)) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._alive.append(value)  # so that no other object gets its id
        if isinstance(value, nn.Module):
            self._visit_module(path, value)
        elif isinstance(value, Tensor):
            self._visit_tensor(path, value)
        elif isinstance(value, list | dict | set | deque):
            self._visit_container(path, value)
        elif isinstance(value, tuple | frozenset):
            self._waiting.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, types.FunctionType):
            self._visit_function(path, value)
        elif isinstance(value, types.BuiltinFunctionType):
            if not isinstance(value.__self__, types.ModuleType):  # of a function, which is no method
                self._waiting.append((path, value.__self__))
        elif isinstance(value, types.MethodType):
            self._waiting += [(path, value.__self__), (path, value.__func__)]
        elif isinstance(value, functools.partial):
            self._waiting += [(path, part) for part in (value.func, value.args, value.keywords)]
        elif isinstance(value, staticmethod | classmethod | property):
            functions = (value.fget, value.fset) if isinstance(value, property) else (value.__func__,)
            self._waiting.extend((path, function) for function in functions)
        elif is_iterator(value):
            self._waiting.extend((path, part) for part in parts_of(value))
        else:
            saved = saved_contents(value)
            if saved is not None:
                self._keep(path, saved[0], saved[1])
                self._compare_value(path, saved[0], lambda: (saved_contents(value) or saved)[0])
            self._visit_object(path, value)

    def _keep(self, path: str, saved: Any, restore: Callable[[Any], object]) -> None:
        self.contents[path] = saved
        self._undo.append(lambda: restore(saved))

    def _lend(self, value: Any, store: Callable[[Any], object]) -> None:
        """Note where an iterator or a cache is stored; a copy of it will stand there."""
        if is_iterator(value) or isinstance(value, CACHE):
            self._iterators.append((value, store))

    def _visit_module(self, path: str, module: nn.Module) -> None:
        attributes = {name: value for name, value in module.__dict__.items() if name not in MODULE_STATE}
        self._keep_names(path, module.__dict__, attributes)
        hooks = [(name, module.__dict__[name]) for name in HOOKS]
        empty = [each for _, each in hooks if type(each) in {dict, OrderedDict} and not each]
        self._seen.update(map(id, empty))
        self._undo.append(functools.partial(empty_again, empty))
        self._waiting.extend((f"{path}.{name}", each) for name, each in hooks if id(each) not in self._seen)
        self._waiting.extend((f"{path}.{name}", buffer) for name, buffer in module._buffers.items())
        self._visit_class(type(module))

    def _visit_class(self, kind: type) -> None:
        for base in (*kind.__mro__, *inspect.getmro(type(kind))):
            if id(base) in self._seen or is_of_library(base.__module__):
                continue
            self._seen.add(id(base))
            functions = {name: value for name, value in vars(base).items() if isinstance(value, types.FunctionType)}
            attributes = {name: value for name, value in vars(base).items() if not name.startswith("__")} | functions
            self._waiting.extend((f"{base.__qualname__}.{name}", value) for name, value in attributes.items())
            plain = {name: each for name, each in attributes.items() if not callable(each) or isinstance(each, CACHE)}
            for name, value in plain.items():
                self._lend(value, functools.partial(type.__setattr__, base, name))
            self._keep(base.__qualname__, plain, functools.partial(restore_class, base, frozenset(vars(base))))
            self._compare_names(base.__qualname__, vars(base), plain)

    def _visit_tensor(self, path: str, tensor: Tensor) -> None:
        if isinstance(tensor, UninitializedBuffer) or tensor.is_meta or is_traceable_wrapper_subclass(tensor):
            return
        version, saved = tensor._version, tensor.detach().clone()
        data = tensor.detach()

        def restore(saved: Tensor) -> None:
            if tensor._version != version or tensor.data_ptr() != data.data_ptr():
                data.copy_(saved)
                tensor.data = data

        if not tensor.is_inference():
            self._keep(path, saved, restore)
            self._compare_value(path, (version, data.data_ptr()), lambda: (tensor._version, tensor.data_ptr()))

    def _visit_container(self, path: str, value: Any) -> None:
        if isinstance(value, dict):
            base: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # a subclass may refuse changes
            items = list(base.items(value))
            self._keep(path, items, lambda saved: refill_dict(base, value, saved))
            self._compare_items(path, list(itertools.chain(*items)), lambda: itertools.chain(*base.items(value)))
            for key, item in items:
                if not is_plain(item):
                    self._lend(item, functools.partial(base.__setitem__, value, key))
                    self._waiting.append((f"{path}[{key!r}]" if isinstance(key, _ATOMS) else path, item))
        elif isinstance(value, set):
            self._keep(path, set(value), lambda saved: refill_set(value, saved))
            self._compare_value(path, {*map(id, value)}, lambda: {*map(id, value)})
        else:
            self._keep(path, list(value), lambda saved: refill(value, saved))
            self._compare_items(path, list(value), lambda: value)
            for index, item in enumerate(value):
                self._lend(item, functools.partial(value.__setitem__, index))
            self._waiting.extend(
                (f"{path}[{index}]", item) for index, item in enumerate(value) if not isinstance(item, _ATOMS)
            )
        if hasattr(value, "__dict__"):
            self._keep_names(path, value.__dict__, dict(value.__dict__))

    def _visit_function(self, path: str, function: types.FunctionType) -> None:
        if is_of_library(str(function.__globals__.get("__name__", ""))):
            wrapped = getattr(function, "__wrapped__", function)  # by a decorator of torch or functools
            if not isinstance(wrapped, types.FunctionType):  # such as a module in torch.vmap
                self._waiting.append((path, wrapped))
                return
            function = wrapped
            if is_of_library(str(function.__globals__.get("__name__", ""))):
                return
        self.functions.append((re.split(r"[.: ]", path.partition("[")[0])[-1], function))
        self._keep_names(path, function.__dict__, dict(function.__dict__))
        self._waiting.append((path, function.__defaults__))
        self._waiting.append((path, function.__kwdefaults__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._visit_cell(f"{path}: {name}", cell)
        names = set(_names(function.__code__))
        self._keep_names_of_file(f"{function.__module__}", function.__globals__, names)
        for name in names & function.__globals__.keys():
            file = function.__globals__[name]
            if isinstance(file, types.ModuleType):
                self._keep_names_of_file(name, vars(file), names, visit=not is_foreign(file))

    def _keep_names_of_file(self, path: str, file: dict[str, Any], names: set[str], *, visit: bool = True) -> None:
        """Save what some names stand for in a file; of what a library has, only plain values are looked at."""
        known = self._names_of_files.setdefault((id(file), visit), set())
        names = names - known
        known |= names
        present = names & file.keys()
        values = {name: file[name] for name in present if visit or isinstance(file[name], _ATOMS)}
        if values:
            self._keep_names(path, file, values)
        if missing := names - present:
            self._undo.append(lambda: remove_names(missing, file))

    def _visit_cell(self, path: str, cell: types.CellType) -> None:
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            return

        def restore(saved: Any) -> None:
            if cell.cell_contents is not saved:
                cell.cell_contents = saved

        self._keep(path, content, restore)
        self._compare_items(path, [content], lambda: [cell.cell_contents])
        self._lend(content, functools.partial(setattr, cell, "cell_contents"))
        self._waiting.append((path, content))

    def _visit_object(self, path: str, value: Any) -> None:
        self._waiting.append((path, getattr(value, "__wrapped__", None)))
        if not keeps_state(value) or (isinstance(value, Optimizer) and self._trains_model(value)):
            return
        if isinstance(getattr(value, "__dict__", None), dict):
            self._keep_names(path, value.__dict__, dict(value.__dict__))
        for name, slot in slots_of(type(value)):
            if hasattr(value, name):
                held = getattr(value, name)
                self._keep(f"{path}.{name}", held, lambda saved, slot=slot: slot.__set__(value, saved))  # type: ignore[misc]
                self._compare_items(f"{path}.{name}", [held], lambda slot=slot: [slot.__get__(value)])  # type: ignore[misc]
                self._lend(held, functools.partial(slot.__set__, value))
                self._waiting.append((f"{path}.{name}", held))
            else:
                self._undo.append(functools.partial(empty_slot, value, name, slot))
        self._visit_class(type(value))

    def _trains_model(self, optimizer: Optimizer) -> bool:
        """Return True for an optimizer of the model's own weights, which no forward may change anyway."""
        return any(id(weight) in self._own for group in optimizer.param_groups for weight in group["params"])

    def _keep_names(self, path: str, holder: dict[str, Any], values: dict[str, Any]) -> None:
        """Save some names of a namespace, and visit what they stand for."""
        is_module = holder.keys() >= MODULE_STATE

        def restore(saved: dict[str, Any]) -> None:
            for name, value in saved.items():
                if name not in holder or holder[name] is not value:
                    holder[name] = value
            if is_module or "__name__" not in holder:  # of a file only the names are known that the code names
                for name in [name for name in holder if name not in saved and not (is_module and name in MODULE_STATE)]:
                    del holder[name]

        self.contents[path] = (
            self.contents.get(path, {}) | values if isinstance(self.contents.get(path), dict) else values
        )
        self._undo.append(lambda: restore(values))
        self._compare_names(path, holder, values)
        for name, value in values.items():
            if not is_plain(value):
                self._lend(value, functools.partial(holder.__setitem__, name))
                self._waiting.append((f"{path}.{name}", value))

    def _compare_names(self, path: str, holder: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Let ``changed`` compare what some names of a namespace stand for."""
        self._changes.append((path, lambda: any(differ(value, holder.get(name)) for name, value in values.items())))

    def _compare_items(self, path: str, items: list[Any], now: Callable[[], Iterable[Any]]) -> None:
        """Let ``changed`` compare items by identity."""

        def has_changed() -> bool:
            others = list(now())
            return len(others) != len(items) or any(map(differ, items, others))

        self._changes.append((path, has_changed))

    def _compare_value(self, path: str, saved: Any, now: Callable[[], Any]) -> None:
        """Let ``changed`` compare what an object holds by its value."""
        self._changes.append((path, lambda: not holds_same(saved, now())))


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of files and attributes that a function names, those of functions inside it included."""
    yield from code.co_names
    if {"globals", "setattr", "getattr"} & set(code.co_names):  # what it names by a text
        yield from (each for each in code.co_consts if isinstance(each, str) and each.isidentifier())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)

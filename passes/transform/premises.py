"""What a graph relies on beside its inputs and tensors: numbers and flags of the model, the order of its layers, no hooks.

A trace records what an attribute is, and calls layers past the blocks that hold them. So a graph computes something else
than the model's own code once a loop sets ``model.temperature``, puts a hook on a block, or appends a layer. These premises
are checked at each call, a microsecond or two for each block, and where one has gone the module's own ``forward`` runs
instead.
"""

from __future__ import annotations

import enum
import inspect
import sys
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_code

from tdfx.layers.factorized import Factorized
from tdfx.layers.module_state import HOOKS, MODULE_STATE
from tdfx.layers.reach import is_full, is_plain
from tdfx.passes.program import Reads

_BY_VALUE = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
_BY_IDENTITY = (type, types.BuiltinFunctionType)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
"""Where torch keeps hooks of all modules, as profilers set them: a graph would not call them for its blocks."""
_MOST_ITEMS = 100
"""Of a longer container only the length is compared."""
_DEEPEST = 4
_ABSENT = "no such attribute"


@dataclass(frozen=True, slots=True)
class _OfModule:
    """What holds for one module, at a path."""

    parents: tuple[str, ...]
    runs: bool
    """Whether the graph has what its forward does inside, and does not call it."""
    kind: type
    children: tuple[str, ...]
    values: tuple[tuple[str, Any], ...]
    """Attributes, and what they were."""
    methods: tuple[str, ...]
    """Methods of its class, in whose place an attribute might be set."""

    @classmethod
    def of(cls, module: nn.Module, path: str, reads: Reads) -> _OfModule:
        """Take down what holds for a module now."""
        names = sorted(
            name for name in reads.names - MODULE_STATE if name in module.__dict__ or _is_of_user(type(module), name)
        )
        plain = [name for name in names if name in module.__dict__ or not hasattr(_of_class(module, name), "__get__")]
        values = tuple((name, _trace_of(getattr(module, name))) for name in plain)
        methods = tuple(name for name in names if isinstance(_of_class(module, name), types.FunctionType))
        parents = tuple(path.split(".")) if path else ()
        return cls(parents, path in reads.entered, type(module), tuple(module._modules), values, methods)

    def holds(self, root: nn.Module) -> bool:
        """Return True if that still holds."""
        module: Any = root
        for name in self.parents:
            module = module._modules.get(name)
            if module is None:
                return False
        state = module.__dict__
        if self.runs:
            if self.parents and (type(module) is not self.kind or any(state[name] for name in HOOKS)):
                return False
            if tuple(state["_modules"]) != self.children:
                return False
        if not all(_is_same(getattr(module, name, _ABSENT), taken) for name, taken in self.values):
            return False
        return not any(name in state for name in self.methods)


@dataclass(frozen=True, slots=True)
class Premises:
    """What held when a graph was made of a module."""

    reads: Reads
    modules: tuple[_OfModule, ...]
    files: tuple[tuple[str, str, Any], ...]
    """File, name in it, value."""

    @classmethod
    def of(cls, module: nn.Module, reads: Reads) -> Premises:
        """Take down what holds for a module now."""
        parts = (_OfModule.of(part, path, reads) for path, part in _modules_read(module, reads))
        files = ((file, name, _in_file(file, name)) for file, names in reads.files.items() for name in sorted(names))
        values = ((file, name, value) for file, name, value in files if isinstance(value, _BY_VALUE))
        return cls(reads, tuple(part for part in parts if part.runs or part.values or part.methods), tuple(values))

    def hold(self, module: nn.Module) -> bool:
        """Return True if the graph still does what the module's own code would do."""
        if any(getattr(module_code, name) for name in _GLOBAL_HOOKS):
            return False
        if any(not _is_same(_in_file(file, name), taken) for file, name, taken in self.files):
            return False
        return all(part.holds(module) for part in self.modules)


def _modules_read(module: nn.Module, reads: Reads) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules by path, without what is inside those that a graph calls as they are."""
    waiting = [("", module)]
    while waiting:
        path, part = waiting.pop()
        if isinstance(part, Factorized | torch.jit.ScriptModule):
            continue
        yield path, part
        if path in reads.entered:
            named = part._modules.items()
            waiting.extend((f"{path}.{name}" if path else name, child) for name, child in named if child is not None)


def _is_of_user(kind: type, name: str) -> bool:
    return any(
        name in vars(base) for base in kind.__mro__ if base.__module__.partition(".")[0] not in {"torch", "tdfx"}
    )


def _of_class(module: nn.Module, name: str) -> Any:
    return inspect.getattr_static(type(module), name, _ABSENT)


def _in_file(file: str, name: str) -> Any:
    return vars(sys.modules[file]).get(name, _ABSENT) if file in sys.modules else _ABSENT


def _trace_of(value: Any, depth: int = 0) -> Any:
    """Return what to remember of a value: itself, if it cannot change, else its class and contents."""
    kind = type(value)
    if isinstance(value, (*_BY_VALUE, *_BY_IDENTITY)):
        return value
    if isinstance(value, (Tensor, nn.Module)) or depth == _DEEPEST:
        return _Contents(kind, 0, ())
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if is_full(cell)]
        return _Contents(kind, 0, (value.__code__, *(_trace_of(cell, depth + 1) for cell in cells)))
    if isinstance(value, dict):
        return _Contents(kind, len(value), tuple(_trace_of(item, depth + 1) for item in _few(value.items())))
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        return _Contents(kind, len(value), tuple(_trace_of(item, depth + 1) for item in _few(value)))
    return _Contents(
        kind, 0, (_trace_of(vars(value), depth + 1),) if is_plain(value) and hasattr(value, "__dict__") else ()
    )


def _few(items: Any) -> Any:
    return items if len(items) <= _MOST_ITEMS else ()


@dataclass(frozen=True, slots=True)
class _Contents:
    """What is remembered of a container or an object."""

    kind: type
    length: int
    parts: tuple[Any, ...]


def _is_same(value: Any, taken: Any) -> bool:
    if value is taken:
        return True
    if isinstance(taken, _Contents):
        return bool(_trace_of(value) == taken)
    return type(value) is type(taken) and isinstance(value, _BY_VALUE) and bool(value == taken)

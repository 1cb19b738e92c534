"""Who holds a parameter besides the one layer that computes with it: other modules, tensors, attributes, hooks."""

from __future__ import annotations

import functools
import types
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdfx.kinds.registry import find_kind
from tdfx.layers.factorized import Factorized
from tdfx.layers.holders import Held, Surroundings, is_of_framework, memory_of, search, share_memory
from tdfx.layers.module_state import HOOKS, MODULE_STATE, STATE_DICT_HOOKS
from tdfx.plans.plan import Reason

_REACHES_PARAMETERS = {
    "parameters",
    "named_parameters",
    "_parameters",
    "get_parameter",
    "state_dict",
    "load_state_dict",
}
"""Names by which code that is given a module gets at its parameters, whatever these are called."""


_REGISTERED = set(MODULE_STATE) - {*HOOKS, *STATE_DICT_HOOKS}
"""Attributes of a module that hold what is registered in it, and nothing else."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Who holds the parameters of a model; all keys are parameters by identity."""

    counts: Mapping[int, int]
    """The number of modules that hold each parameter."""
    shared: Mapping[int, str]
    """The path of another tensor of the model on the same memory."""
    held: Mapping[int, str]
    """What else holds the parameter, or may write to it, in words."""

    def blocker(self, weight: nn.Parameter) -> tuple[Reason | None, str]:
        """Return the reason why factors cannot take the place of a parameter, and the reason in words; or None and ""."""
        if self.counts[id(weight)] > 1:
            return Reason.TIED, f"{self.counts[id(weight)]} modules hold its weight"
        if other := self.shared.get(id(weight)):
            return Reason.TIED, f"it shares its memory with {other!r}"
        if holder := self.held.get(id(weight)):
            return Reason.READ_ELSEWHERE, holder
        return None, ""


def owners_of(root: nn.Module, surroundings: Surroundings | None = None) -> Owners:
    """Find who holds each parameter of a model, in the model itself and in the one around it."""
    inside, outside = dict(root.named_modules()), {} if surroundings is None else surroundings.modules()
    modules = [*inside.items(), *outside.items()]
    counts = Counter(id(tensor) for _, module in modules for tensor in module._parameters.values())
    by_storage: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    tensors = _tensors(modules)
    for path, tensor in tensors.values():
        if (memory := memory_of(tensor)) is not None:
            by_storage[memory[0]].append((path, tensor))
    held = dict(_hooked([module for _, module in modules]))
    # The part itself stays the object that it is, and the modules in it do not.
    staying = set() if surroundings is None else {*outside.values(), surroundings.part}
    held |= _in_attributes(inside, {*inside.values(), *staying}, tensors, by_storage)
    held |= _in_attributes(outside, staying, tensors, by_storage)
    return Owners(counts, dict(_sharing(by_storage)), held)


def _tensors(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, tuple[str, Tensor]]:
    """Return the parameters and buffers of modules with their first paths, by identity."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for path, module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor))
    return tensors


def _sharing(by_storage: Mapping[int, list[tuple[str, Tensor]]]) -> Iterator[tuple[int, str]]:
    for listed in by_storage.values():
        for path, tensor in listed if len(listed) > 1 else ():
            yield from ((id(other), path) for _, other in listed if other is not tensor and share_memory(tensor, other))


def _in_attributes(
    modules: Mapping[str, nn.Module],
    followed: Collection[nn.Module],
    tensors: Mapping[int, tuple[str, Tensor]],
    by_storage: Mapping[int, list[tuple[str, Tensor]]],
) -> dict[int, str]:
    """Return the parameters that an attribute of some modules holds, or a hook by its closure, and which.

    Args:
        modules: The modules, by path.
        followed: The modules that an attribute may refer to: it will refer to what takes their place, or they stay.
        tensors: All parameters and buffers with their paths, by identity.
        by_storage: The same by the identity of their storages.
    """
    found: dict[int, str] = {}
    for held in _attributes(modules, followed):
        if isinstance(held.value, int) and held.value in tensors:
            found[held.value] = f"the model refers to its weight by its id, in {held.path}"
        elif isinstance(held.value, Tensor):
            memory = memory_of(held.value)
            sharing = by_storage.get(memory[0], ()) if memory is not None else ()
            same = {id(tensor) for _, tensor in sharing if share_memory(held.value, tensor)} | {id(held.value)}
            found |= dict.fromkeys(same & tensors.keys(), f"the model holds its weight in {held.path} too")
    return found


def _attributes(modules: Mapping[str, nn.Module], followed: Collection[nn.Module]) -> Iterator[Held]:
    """Yield what the attributes of modules and of their classes hold, with the tensors of modules that are not followed."""
    classes: set[type] = set()
    for path, module in modules.items():
        if isinstance(module, Factorized):
            continue
        kept = {name: value for name, value in module.__dict__.items() if name not in _REGISTERED}
        values = {f"{path}.{name}" if path else name: value for name, value in {**kept, **module._modules}.items()}
        for cls in type(module).__mro__:
            if cls not in classes and not is_of_framework(cls):
                classes.add(cls)
                values |= {f"{cls.__name__}.{name}": value for name, value in vars(cls).items()}
        for where, value in values.items():
            for held in search(value, where):
                yield held
                if isinstance(held.value, nn.Module):
                    yield from _tensors_of_others(held, followed)


def _tensors_of_others(held: Held, followed: Collection[nn.Module]) -> Iterator[Held]:
    """Yield the tensors of a module, and of the modules in it, as far as these are not followed."""
    if held.value in followed:
        return
    for name, tensor in (*held.value._parameters.items(), *held.value._buffers.items()):
        yield Held(f"{held.path}.{name}", tensor)
    for name, child in held.value.named_children():
        yield from _tensors_of_others(Held(f"{held.path}.{name}", child), followed)


def _hooked(modules: Iterable[nn.Module]) -> Iterator[tuple[int, str]]:
    """Yield the parameters that a hook of their layer may read or write, or that a hook of a module around it may write."""
    for module in modules:
        if isinstance(module, Factorized):
            continue
        kind = find_kind(module)
        for hook in _hooks(module, (*HOOKS, *STATE_DICT_HOOKS) if kind is not None else HOOKS):
            names = set(_names_in(hook, {id(module)}))
            reaches = names & (_REACHES_PARAMETERS | ({kind.weight} if kind is not None else {"weight"}))
            if reaches and (kind is not None or any(map(_writes, names))):
                note = f"a hook on {type(module).__name__}, {_name_of(hook)}, may read or write it"
                yield from ((id(parameter), note) for parameter in module.parameters())


def _hooks(module: nn.Module, attributes: Iterable[str]) -> Iterator[Any]:
    for name in attributes:
        hooks = module.__dict__[name]
        if isinstance(hooks, dict):
            yield from filter(callable, hooks.values())


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _writes(name: str) -> bool:
    """Return True for a name by which code writes to a tensor: ``data``, or a method such as ``clamp_``."""
    return name == "data" or (name.endswith("_") and not name.startswith("_"))


def _names_in(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield the names and texts that the code of a callable uses, with that of the functions that it calls."""
    if id(value) in seen or len(seen) > 100:
        return
    seen.add(id(value))
    if isinstance(value, str):
        yield value
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _names_in(part, seen)
    elif isinstance(value, types.MethodType):
        yield from _names_in(value.__func__, seen)
        code = getattr(value.__func__, "__code__", None)
        for name in _code_names(code) if code is not None else ():
            yield from _names_in(getattr(type(value.__self__), name, None), seen)
    elif isinstance(value, types.FunctionType):
        yield from _names_in_function(value, seen)
    elif callable(value) and not isinstance(value, type | types.BuiltinFunctionType):
        yield from _names_in(type(value).__call__, seen)


def _names_in_function(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    if (function.__module__ or "").partition(".")[0] == "torch":
        return
    names = list(_code_names(function.__code__))
    yield from names
    for cell in function.__closure__ or ():
        try:
            yield from _names_in(cell.cell_contents, seen)
        except ValueError:  # an empty cell: the name was never assigned
            continue
    for value in (*(function.__defaults__ or ()), *(function.__globals__.get(name) for name in names)):
        if isinstance(value, types.FunctionType | str):
            yield from _names_in(value, seen)


def _code_names(code: types.CodeType) -> Iterator[str]:
    """Yield the names and texts in a function's code, and in the functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _code_names(constant)

"""What the attributes of a model reach besides its modules: containers, and objects of the user's own classes.

A structural copy asks two things of it. An object that holds layers of the model, such as a router of experts or a sampler
that was given ``self``, is copied with the model, because a shared one would go on calling the layers of the original;
unless it is the one that trains the model. And a container that somebody else holds too, and that holds no layer, stays the
same object, because both must go on seeing the same contents.
"""

from __future__ import annotations

import argparse
import collections
import functools
import inspect
import sys
import types
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from tdfx.layers.holders import attributes_of, is_of_framework

CONTAINERS = (dict, list, tuple, set, deque)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList)
"""Classes of the standard library whose objects hold what a user puts there."""
_MAKERS: tuple[Any, ...] = (object.__new__, types.SimpleNamespace.__new__)
"""What makes an object that has no more than attributes."""
_OF_TRAINERS = (Optimizer, LRScheduler, DataLoader)
"""Objects that whoever trains a model holds, and no part of it."""
_TDFX = f"{Path(__file__).parents[1]}/"
_MOST_PARTS = 1000
"""Parts of one object of a caller that are looked at."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Objects by identity, as they were found."""

    held: dict[int, Any]
    """The containers that the model holds, also inside others and in objects that are copied with it."""
    owned: dict[int, Any]
    """The objects of the user's classes that hold layers of the model, or the model itself without being its trainer."""
    shared: frozenset[int]
    """The containers without layers that an object of the user's, or the file of a model's class, holds too."""
    inside: frozenset[int]
    """All that holds a module of the model, however deep."""


def reach_of(
    values: Iterable[Any], hooks: Iterable[Any], modules: Collection[int], root: int, classes: Iterable[type]
) -> Reach:
    """Find what the attributes and hooks of a model reach.

    Args:
        values: The attributes.
        hooks: The hooks.
        modules: The model's modules, by identity.
        root: The model itself, by identity: an object that refers to it may be its trainer.
        classes: The classes of the modules; what their files hold by name is held by somebody else.
    """
    values = list(values)
    found, holders = _walk([*values, *hooks])
    inside = _reaching(modules, holders)
    owned = {key: each for key, each in found.items() if key in inside and is_plain(each)}
    if owners := _reaching({root}, holders) & owned.keys():
        trainers = _reaching({key for key, each in found.items() if isinstance(each, _OF_TRAINERS)}, holders)
        for key in owners & (trainers | _known_to_callers()):
            del owned[key]
    others = [each for key, each in found.items() if is_plain(each) and key not in owned]
    files = [vars(sys.modules[name]) for name in {each.__module__ for each in classes} if name in sys.modules]
    held = {id(each): each for each in _containers(values, owned)}
    elsewhere = {id(each) for each in _containers(others, {id(each): each for each in others})}
    elsewhere |= {id(value) for names in files for value in names.values()}
    return Reach(held, owned, frozenset(held.keys() & elsewhere - inside), frozenset(inside))


def is_plain(value: Any) -> bool:
    """Return True for an object of a user's own class that consists of its attributes, and can be made again from them."""
    kind = type(value)
    if (
        isinstance(value, (*CONTAINERS, nn.Module, Tensor, type))
        or kind.__new__ not in _MAKERS
        or is_of_framework(kind)
    ):
        return False
    is_of_python = kind.__module__.partition(".")[0] in sys.stdlib_module_names
    return (kind in _NAMESPACES or not is_of_python) and not hasattr(kind, "__del__")


def _known_to_callers() -> set[int]:
    """Return what the functions that are running outside of tdfx name, and what that refers to, by identity."""
    known: set[int] = set()
    frame = inspect.currentframe()
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_TDFX):
            for value in (*frame.f_locals.values(), *frame.f_globals.values()):
                known.add(id(value))
                known.update(map(id, islice(_parts(value), _MOST_PARTS)))
        frame = frame.f_back
    return known


def _walk(values: list[Any]) -> tuple[dict[int, Any], dict[int, list[int]]]:
    """Return all that some values reach, and what each is held by; both by identity."""
    found: dict[int, Any] = {}
    holders: defaultdict[int, list[int]] = defaultdict(list)
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) not in found:
            found[id(value)] = value
            for part in _parts(value):
                holders[id(part)].append(id(value))
                waiting.append(part)
    return found, holders


def _parts(value: Any) -> Iterator[Any]:
    """Yield what an object refers to, and what is not a plain value."""
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        parts = (*dict.keys(value), *dict.values(value))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        parts = list(value)
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        parts = (value.__self__, value.__func__)
    elif isinstance(value, types.BuiltinMethodType):
        parts = (value.__self__,)
    elif isinstance(value, types.FunctionType) and not is_of_framework(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if is_full(cell)]
        parts = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif is_plain(value):
        parts = attributes_of(value).values()
    return (part for part in parts if not isinstance(part, (bool, int, float, str, bytes, Tensor, type(None))))


def is_full(cell: types.CellType) -> bool:
    """Return True if the name that a function closes over has been assigned."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _reaching(targets: Collection[int], holders: dict[int, list[int]]) -> set[int]:
    """Return what holds one of some objects, or holds what holds one, by identity."""
    reaching: set[int] = set()
    waiting = [holder for target in targets for holder in holders.get(target, ())]
    while waiting:
        value = waiting.pop()
        if value not in reaching:
            reaching.add(value)
            waiting.extend(holders.get(value, ()))
    return reaching


def _containers(values: Iterable[Any], objects: Collection[int]) -> Iterator[Any]:
    """Yield the containers among some values, and those inside them and inside some objects."""
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, CONTAINERS):
            yield value
            waiting.extend(dict.values(value) if isinstance(value, dict) else value)
        elif id(value) in objects:
            waiting.extend(attributes_of(value).values())

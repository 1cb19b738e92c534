"""Iterators that a user's model keeps: what its code draws from while it is looked at, so that they stay where they are."""

from __future__ import annotations

import inspect
import io
import types
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from tdfx.passes.analysis.code_reader import UnsafeCodeError
from tdfx.passes.analysis.libraries import is_of_library


class RefusingIterator:
    """Stands for an iterator in a trace, which would record what it gives once for all."""

    def __iter__(self) -> RefusingIterator:
        return self

    def __next__(self) -> Any:
        raise UnsafeCodeError("its forward draws from an iterator that it keeps")


class RecordingIterator:
    """Draws from an iterator that cannot be copied, and remembers what it gave."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.drawn: list[Any] = []

    def __iter__(self) -> RecordingIterator:
        return self

    def __next__(self) -> Any:
        self.drawn.append(next(self.source))
        return self.drawn[-1]

    def send(self, value: Any) -> Any:
        """Raise UnsafeCodeError: what a generator gives later depends on what it is sent, and it cannot be set back."""
        raise UnsafeCodeError("its forward sends values to a generator that it keeps, which cannot be set back")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class ReplayingIterator:
    """Gives what was drawn from an iterator while a model was looked at, and then goes on with the iterator."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.waiting: deque[Any] = deque()

    def __iter__(self) -> ReplayingIterator:
        return self

    def __next__(self) -> Any:
        return self.waiting.popleft() if self.waiting else next(self.source)

    def send(self, value: Any) -> Any:
        """Do what a generator does, which no one has sent anything while the model was looked at."""
        return self.source.send(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class _NoCopyError(Exception):
    """An iterator cannot be copied."""


def is_iterator(value: Any) -> bool:
    """Return True for an iterator of a library, and for a generator: nothing that can be put back."""
    if type(value) in weakref.ProxyTypes or isinstance(value, io.IOBase):  # whose classes can iterate, too
        return False
    is_own = is_of_library(type(value).__module__) or isinstance(value, ReplayingIterator)
    return is_own and isinstance(value, Iterator)


def copy_of(iterator: Any) -> Any:
    """Return an iterator that gives the same values without moving the original, or a RecordingIterator if there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Python 3.12 deprecates the copies of itertools
            return _copied(iterator, {})
    except (_NoCopyError, TypeError, AttributeError):
        return RecordingIterator(iterator)


def put_back(iterator: Any, lent: Any) -> None:
    """Let an iterator give once more what was drawn by way of what was lent in its place."""
    if isinstance(lent, RecordingIterator) and isinstance(iterator, ReplayingIterator):
        iterator.waiting.extendleft(reversed(lent.drawn))
        lent.drawn.clear()


def parts_of(iterator: Any) -> list[Any]:
    """Return what an iterator draws from, and the functions that it calls."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return list(_arguments(iterator))
    except (_NoCopyError, TypeError, AttributeError):
        return []


def _reduced(iterator: Any) -> tuple[Any, ...]:
    """Return how an iterator is built again; only those of Python's own types share nothing with their copies."""
    reduced = iterator.__reduce__() if type(iterator).__module__ in {"builtins", "itertools"} else None
    if not isinstance(reduced, tuple):
        raise _NoCopyError
    return reduced


def _arguments(iterator: Any) -> tuple[Any, ...]:
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        return tuple(frame.f_locals.values()) if frame is not None else ()
    reduced = _reduced(iterator)
    return (*reduced[1], *(reduced[2] if len(reduced) > 2 and isinstance(reduced[2], tuple) else ()))


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Copy an iterator and those that it draws from, and share all else."""
    if not isinstance(value, Iterator):
        return value
    if id(value) not in copies:
        copies[id(value)] = _copied_generator(value, copies) if inspect.isgenerator(value) else _rebuilt(value, copies)
    return copies[id(value)]


def _rebuilt(iterator: Any, copies: dict[int, Any]) -> Any:
    reduced = _reduced(iterator)
    if len(reduced) > 3:
        raise _NoCopyError
    build, arguments, *states = reduced
    copied = build(*(_copied(argument, copies) for argument in arguments))
    for state in states:
        if state is not None:  # what cycle has seen so far it keeps in a list, which grows
            parts = state if isinstance(state, tuple) else (state,)
            fresh = [list(part) if isinstance(part, list) else _copied(part, copies) for part in parts]
            copied.__setstate__(tuple(fresh) if isinstance(state, tuple) else fresh[0])
    return copied


def _copied_generator(generator: types.GeneratorType[Any, Any, Any], copies: dict[int, Any]) -> Any:
    """Start a generator once more that has not begun; one that has cannot be copied."""
    code, frame = generator.gi_code, generator.gi_frame
    if inspect.getgeneratorstate(generator) != inspect.GEN_CREATED or code.co_freevars or frame is None:
        raise _NoCopyError
    flags = (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)
    count = code.co_argcount + code.co_kwonlyargcount
    if any(code.co_flags & flag for flag in flags) or code.co_kwonlyargcount:
        raise _NoCopyError
    arguments = [_copied(frame.f_locals[name], copies) for name in code.co_varnames[:count]]
    return types.FunctionType(code, frame.f_globals)(*arguments)

"""What ``help`` shows: the texts under the fields of a dataclass as the section ``Args:``, and no private arguments."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

_WIDTH = 100
"""Columns of the section in the docstring."""
F = TypeVar("F", bound=Callable[..., Any])
_SECTION = re.compile(r"^(Raises|Example|Source):", re.MULTILINE)


def describe_fields(cls: type) -> None:
    """Add the section on the arguments of a dataclass to its docstring."""
    docs = _FieldDocs(cls)
    # Of a class with a metaclass of its own, such as ABCMeta, pydoc reads the attribute without calling its __get__.
    cls.__doc__ = docs if type(cls) is type else docs.__get__(None)  # type: ignore[assignment]


class _FieldDocs:
    """A ``__doc__`` that is put together when someone asks for it: reading a class's source takes some milliseconds.

    Args:
        cls: A dataclass. Its fields are described in its source, each by a string under it; a string under several fields
            that stand together, without a text of their own, is about all of them.
    """

    def __init__(self, cls: type) -> None:
        self.cls, self.text = cls, cls.__doc__ or ""

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return self._whole

    @cached_property
    def _whole(self) -> str:
        """The docstring with the section before those on errors, sources and examples, which come last."""
        arguments = [name for name in inspect.signature(self.cls).parameters if not name.startswith("_")]
        texts = dict(itertools.chain.from_iterable(map(_field_texts, reversed(self.cls.__mro__))))
        lines = []
        for text, names in itertools.groupby(arguments, texts.get):
            about = f"{', '.join(names)}: {' '.join(text.split()) if text else ''}"
            lines += textwrap.wrap(about, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
        doc = inspect.cleandoc(self.text)
        if not lines or "Args:" in doc.splitlines():
            return doc
        section = "\n".join(["Args:", *lines])
        last = _SECTION.search(doc)
        head, rest = (doc, "") if last is None else (doc[: last.start()], f"\n\n{doc[last.start() :]}")
        return f"{head.rstrip()}\n\n{section}{rest}"


def _field_texts(cls: Any) -> Iterator[tuple[str, str]]:
    """Yield the fields that a class declares, with the string under each, or under the last of those that share one."""
    try:
        (declaration,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):  # built-in, or shipped without its source
        return
    assert isinstance(declaration, ast.ClassDef)
    waiting: list[str] = []
    for statement in declaration.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)):
                waiting.append(name)
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield from ((name, text) for name in waiting)
                waiting = []
            case _:
                waiting = []


def hide_private(function: F) -> F:
    """Leave out of a function's signature, which ``help`` shows, the arguments that begin with an underscore."""
    signature = inspect.signature(function)
    public = [argument for name, argument in signature.parameters.items() if not name.startswith("_")]
    function.__signature__ = signature.replace(parameters=public)  # type: ignore[attr-defined]
    return function

"""The source of the functions that a trace runs."""

from __future__ import annotations

import ast
import inspect
import linecache
import sysconfig
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from types import CodeType

import torch

from tdfx.errors import TdfxError


def _folder(path: Path) -> str:
    """Return a folder with a slash at its end: without it, torchvision would be in the folder of torch."""
    return f"{path}/"


TORCH = _folder(Path(torch.__file__).parent)
"""The folder of PyTorch."""
_OWN = (_folder(Path(inspect.getfile(TdfxError)).parent), _folder(Path(__file__).resolve().parents[1]))
STANDARD_LIBRARY = _folder(Path(sysconfig.get_path("stdlib")))
_MODULES_OF_TORCH = f"{TORCH}nn/modules/"
_GENERATED = ("<eval_with_key>", "<frozen ")
"""How the names begin of files that have no source of the user's: the code of graphs, and Python's own."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@lru_cache(maxsize=4096)
def is_users_file(name: str) -> bool:
    """Return True for a file whose code must be read before a graph may stand for it.

    The forwards of torch.nn are read too: a class that derives from one of them may run it.
    """
    if name.startswith(_MODULES_OF_TORCH):
        return not name.endswith(("/module.py", "/container.py"))
    if name.startswith((TORCH, *_OWN, *_GENERATED)):
        return False
    return not (name.startswith(STANDARD_LIBRARY) and "site-packages" not in name)


def definition_of(code: CodeType) -> Definition | None:
    """Return the definition that a function was compiled from; None if its source cannot be had."""
    candidates = _definitions(code.co_filename).get((code.co_firstlineno, code.co_name), ())
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    # torch.fx runs a root that takes *args as code that takes them as one argument.
    fitting = [each for each in candidates if _names(each) == names or _names(each, rest=True) == names]
    return fitting[0] if len(fitting) == 1 else None


def line_of(code: CodeType, number: int) -> str:
    """Return where a line stands and what it says, for people."""
    text = linecache.getline(code.co_filename, number).strip()
    return f"{Path(code.co_filename).name}:{number}" + (f": {text}" if text else "")


def _names(definition: Definition, *, rest: bool = False) -> tuple[str, ...]:
    """Return the names of the arguments of a function, with those of ``*args`` and ``**kwargs`` or without."""
    arguments = definition.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    others = [each for each in (arguments.vararg, arguments.kwarg) if each is not None and rest]
    return tuple(argument.arg for argument in (*named, *others))


def _definitions(filename: str) -> dict[tuple[int, str], list[Definition]]:
    linecache.checkcache(filename)
    return _parsed(filename, "".join(linecache.getlines(filename)))


@lru_cache(maxsize=256)
def _parsed(filename: str, text: str) -> dict[tuple[int, str], list[Definition]]:
    """Return every function of a file by its first line, decorators included, and its name."""
    found: defaultdict[tuple[int, str], list[Definition]] = defaultdict(list)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # not Python, or cells with commands of a notebook
        return {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(each.lineno for each in (node, *node.decorator_list))
            found[first, node.name].append(node)
        elif isinstance(node, ast.Lambda):
            found[node.lineno, "<lambda>"].append(node)
    return dict(found)

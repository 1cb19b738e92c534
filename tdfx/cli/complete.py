"""What the shell offers where a word of a command is being typed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click

from tdfx.cli.rows import FILTERS
from tdfx.ranks.registry import rule_names

_TORCHVISION = "torchvision:"


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return names of torchvision's models, files of Python code, and what such a file defines."""
    source, colon, name = incomplete.rpartition(":")
    if source == "torchvision":
        from torchvision import models

        return [f"{_TORCHVISION}{one}" for one in models.list_models() if one.startswith(name)]
    if colon:
        return [f"{source}:{one}" for one in _defined(Path(source)) if one.startswith(name)]
    offered = [_TORCHVISION] if _TORCHVISION.startswith(incomplete) else []
    return (
        offered
        + [f"{one}:" for one in _paths(incomplete, (".py",)) if one.endswith(".py")]
        + [one for one in _paths(incomplete, ()) if one.endswith("/")]
    )


def complete_policy(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return names of rules and files of policies."""
    names = [one for one in rule_names() if one.startswith(incomplete)]
    return names + _paths(incomplete, (".toml", ".json"))


def complete_filter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return what filters there are beside globs."""
    return [one for one in FILTERS if one.startswith(incomplete)]


def _paths(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    """Return folders, with a slash, and files of some endings, that begin as the word does."""
    head, slash, begun = incomplete.rpartition("/")
    try:
        found = sorted(Path(head + slash or ".").iterdir())
    except OSError:
        return []
    found = [one for one in found if one.name.startswith(begun) and not one.name.startswith(".")]
    folders = [f"{head}{slash}{one.name}/" for one in found if one.is_dir()]
    return folders + [f"{head}{slash}{one.name}" for one in found if one.suffix in endings and one.is_file()]


def _defined(path: Path) -> Iterator[str]:
    """Yield the public functions, classes and other names of a file, without running it."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [one.id for one in node.targets if isinstance(one, ast.Name)]
        else:
            names = []
        yield from (one for one in names if not one.startswith("_"))

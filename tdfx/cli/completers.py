"""Completions of models, policies and filters for the word that is being typed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click

_TORCHVISION = "torchvision:"


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return names of torchvision's models, Python files and folders, and the names that a Python file defines."""
    source, colon, prefix = incomplete.rpartition(":")
    if source == "torchvision":
        from torchvision import models

        return [f"{_TORCHVISION}{name}" for name in models.list_models() if name.startswith(prefix)]
    if colon:
        return [f"{source}:{name}" for name in _public_names(Path(source)) if name.startswith(prefix)]
    torchvision = [_TORCHVISION] if _TORCHVISION.startswith(incomplete) else []
    return [*torchvision, *(f"{path}:" for path in _files(incomplete, ".py")), *_folders(incomplete)]


def complete_policy(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return names of rules, policy files and folders."""
    from tdfx.ranks.registry import rule_names

    rules = [name for name in rule_names() if name.startswith(incomplete)]
    return rules + _folders(incomplete) + _files(incomplete, ".toml", ".json")


def complete_filter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the filters that are not globs."""
    from tdfx.cli.rows import FILTERS

    return [name for name in FILTERS if name.startswith(incomplete)]


def _folders(incomplete: str) -> list[str]:
    return [f"{text}/" for text, path in _matching_paths(incomplete) if path.is_dir()]


def _files(incomplete: str, *suffixes: str) -> list[str]:
    return [text for text, path in _matching_paths(incomplete) if path.suffix in suffixes and path.is_file()]


def _matching_paths(incomplete: str) -> list[tuple[str, Path]]:
    """Return the paths that begin with the word, as text in the same form, without hidden files."""
    folder, slash, prefix = incomplete.rpartition("/")
    try:
        paths = sorted(Path(folder + slash or ".").iterdir())
    except OSError:
        return []
    visible = [path for path in paths if path.name.startswith(prefix) and not path.name.startswith(".")]
    return [(f"{folder}{slash}{path.name}", path) for path in visible]


def _public_names(path: Path) -> Iterator[str]:
    """Yield the public functions, classes and variables of a file, without running it."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.Assign(targets=targets):
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            case _:
                continue
        yield from (name for name in names if not name.startswith("_"))

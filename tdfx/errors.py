"""One class for each kind of failure; each is also a subclass of the built-in error that a caller would catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


class TdfxError(Exception):
    """The base of all errors that tdfx raises on purpose."""


class PolicyError(TdfxError, ValueError):
    """A policy, a rank rule or a scheme name that cannot be carried out."""


class PlanError(TdfxError, ValueError):
    """A plan that is malformed, or that belongs to another model."""


class ModelError(TdfxError, ValueError):
    """A model that cannot be used as it was passed: wrapped, empty, or not a module."""


class ModelReferenceError(TdfxError, ValueError):
    """A model named on the command line that cannot be found or built."""


class InputError(TdfxError, ValueError):
    """Example inputs that the model does not accept."""


class KindError(TdfxError, TypeError):
    """A layer kind that is incomplete, or not registered."""


class WeightError(TdfxError, ValueError):
    """A weight that cannot be decomposed: NaN, infinite, or without values."""


class OptimizerError(TdfxError, ValueError):
    """An optimizer that does not belong to the model."""


class CheckpointError(TdfxError, RuntimeError):
    """A checkpoint that cannot be written or read, or that belongs to another model or optimizer."""


class MergeError(TdfxError, RuntimeError):
    """A model that cannot be merged back."""


class ExportError(TdfxError, RuntimeError):
    """A model that torch.onnx cannot export, or an ONNX file that cannot be run."""


class ReportError(TdfxError, RuntimeError):
    """A report that cannot be drawn, because a package is missing, or cannot be written."""


class PassError(TdfxError, AssertionError):
    """A compiler pass that broke its own contract: a defect of tdfx, never of the model."""


class TdfxWarning(UserWarning):
    """Something that works, but perhaps not as the user expects."""


def class_named(name: str) -> type[TdfxError]:
    """Return the error class of a name that another process sent; TdfxError if there is none.

    >>> class_named("InputError").__name__, class_named("KeyError").__name__
    ('InputError', 'TdfxError')
    """
    error = globals().get(name)
    return error if isinstance(error, type) and issubclass(error, TdfxError) else TdfxError


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, to use within a sentence; its class if it has no text.

    >>> first_line(ValueError("no room.\\n  File ...")), first_line(KeyError())
    ('no room', 'KeyError')
    """
    return str(error).strip().partition("\n")[0].rstrip(".!") or type(error).__name__


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Return the closest of ``names`` as a readable list, for the end of an error message.

    >>> nearest("tuker2", ["svd", "tucker2"])
    "'tucker2'"
    >>> nearest("laier1.*", ["conv1", "layer1.0.conv1", "layer2.0.conv1", "fc"], 1)
    "'layer1.*'"
    """
    names = sorted(names)
    if not names:
        return "none"
    close = _close_stems(name, names, count) or difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    return ", ".join(map(repr, close or names[:count]))


def _close_stems(pattern: str, names: Sequence[str], count: int) -> list[str]:
    """Return globs like one such as ``"laier1.*"``, with its part before the first wildcard taken from real names."""
    wildcards = [place for place, letter in enumerate(pattern) if letter in "*?["]
    if not wildcards:
        return []
    before = pattern[: wildcards[0]]
    stem = before.rpartition(".")[0] or before
    depth = stem.count(".") + 1
    stems = {".".join(name.split(".")[:depth]) for name in names}
    globs = [close + pattern[len(stem) :] for close in difflib.get_close_matches(stem, stems, n=count, cutoff=0.6)]
    return [glob for glob in globs if any(fnmatchcase(name, glob) for name in names)]

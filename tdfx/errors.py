"""One class per kind of failure; each is also a subclass of the built-in that a caller would catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TdfxError(Exception):
    """Everything that tdfx raises on purpose."""


class PolicyError(TdfxError, ValueError):
    """A policy, a rank rule or a scheme name that cannot be carried out."""


class PlanError(TdfxError, ValueError):
    """A plan that is malformed, or that belongs to another model."""


class ModelError(TdfxError, ValueError):
    """A model that cannot be worked on as it was given: wrapped, empty, or not a module."""


class ModelReferenceError(TdfxError, ValueError):
    """A model named on the command line that cannot be found or built."""


class InputError(TdfxError, ValueError):
    """Example inputs that the model does not accept."""


class KindError(TdfxError, TypeError):
    """A layer kind that does not say what its layers are, or that is not registered."""


class WeightError(TdfxError, ValueError):
    """A weight that cannot be decomposed: NaN, infinite, or without values."""


class OptimizerError(TdfxError, ValueError):
    """An optimizer that does not go with the model."""


class CheckpointError(TdfxError, RuntimeError):
    """A checkpoint that cannot be written or read, or that belongs to another model or optimizer."""


class MergeError(TdfxError, RuntimeError):
    """A model that cannot be merged back."""


class ExportError(TdfxError, RuntimeError):
    """A model that torch.onnx cannot export, or an ONNX file that cannot be run."""


class ReportError(TdfxError, RuntimeError):
    """A report that cannot be drawn, for want of a package, or cannot be written."""


class PassError(TdfxError, AssertionError):
    """A compiler pass broke its own contract: a defect of tdfx, never of the model."""


class TdfxWarning(UserWarning):
    """Something that works, but not as the user may think."""


def class_named(name: str) -> type[TdfxError]:
    """Return the class of errors here that has a name, as another process tells it; TdfxError where none has.

    >>> class_named("InputError").__name__, class_named("KeyError").__name__
    ('InputError', 'TdfxError')
    """
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, TdfxError) else TdfxError


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, to stand within a sentence; its class if it has none.

    >>> first_line(ValueError("no room.\\n  File ...")), first_line(KeyError())
    ('no room', 'KeyError')
    """
    return str(error).strip().partition("\n")[0].rstrip(".!") or type(error).__name__


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Return the closest of ``names`` as a readable list, for the end of an error message.

    >>> nearest("tuker2", ["svd", "tucker2"])
    "'tucker2'"
    """
    known = sorted(names)
    if not known:
        return "none"
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4) or known[:count]
    return ", ".join(repr(one) for one in close)

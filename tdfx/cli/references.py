"""Models named on the command line: ``torchvision:NAME``, ``package.module:factory`` or ``path/to/file.py:factory``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tdfx.errors import ModelReferenceError, nearest

_FORMS = "Write torchvision:resnet50, package.module:factory, or path/to/file.py:factory."


def build_model(reference: str) -> nn.Module:
    """Build the model that a reference names, untrained; see ``find_model``."""
    return find_model(reference)()


def find_model(reference: str) -> Callable[[], nn.Module]:
    """Import what a reference names, and return what builds the model, untrained.

    Args:
        reference: ``torchvision:NAME`` for a model of torchvision, else a module or a file, a colon, and the name of a
            function or class that is called without arguments, or of a module object.

    Raises:
        ModelReferenceError: There is no such name; or, when it is called, it does not give an nn.Module.
    """
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise ModelReferenceError(f"{reference!r} does not name a model: {what_is_meant(reference)}")
    if source == "torchvision":
        return partial(_from_torchvision, name)
    module = _from_file(Path(source)) if source.endswith(".py") else _from_package(source)
    if not hasattr(module, name):
        public = [defined for defined in vars(module) if not defined.startswith("_")]
        hint = f"Nearest: {nearest(name, public)}." if public else "It defines nothing."
        raise ModelReferenceError(f"{reference!r}: there is no {name!r} in it. {hint}")
    return partial(_call, reference, getattr(module, name))


def what_is_meant(reference: str) -> str:
    """Return what to write in place of a name without a colon, for the end of an error message."""
    from torchvision import models

    stem, names = reference.strip(":"), models.list_models()
    path = Path(stem)
    if stem in names:
        return f"write torchvision:{stem}."
    if path.suffix == ".py" or path.with_suffix(".py").is_file():
        return f"add the function that builds the model, as in {path.with_suffix('.py')}:build."
    close = difflib.get_close_matches(stem, names, n=1, cutoff=0.75)
    hint = f"Did you mean torchvision:{close[0]}? " if close else ""
    return f"it lacks a part before or after the colon. {hint}{_FORMS}"


def _from_torchvision(name: str) -> nn.Module:
    from torchvision import models

    names = models.list_models()
    if name not in names:
        raise ModelReferenceError(
            f"torchvision has no model {name!r} among its {len(names)}. Nearest: {nearest(name, names)}."
        )
    # Detection and segmentation models would otherwise download the weights of a backbone.
    takes_backbone = "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
    try:
        model: nn.Module = models.get_model(name, weights=None, **{"weights_backbone": None} if takes_backbone else {})
    except Exception as error:  # a factory can raise anything
        cause = f"{type(error).__name__}: {error}"
        raise ModelReferenceError(f"torchvision's {name!r} could not be built: {cause}.") from error
    return model


def _from_file(path: Path) -> ModuleType:
    try:
        exists = path.is_file()
    except OSError:  # a name that is too long
        exists = False
    if not exists:
        raise ModelReferenceError(f"There is no file {str(path)!r} to take a model from. {_FORMS}")
    name = f"_tdfx_reference_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, f"no loader for {path}"
    assert spec.loader is not None, f"no loader for {path}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file can raise anything, and can exit
        del sys.modules[name]
        raise ModelReferenceError(
            f"The file {str(path)!r} could not be run: {type(error).__name__}: {error}. It is imported as a module, so it "
            f"must run on its own."
        ) from error
    return module


def _from_package(source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise ModelReferenceError(
            f"The module {source!r} could not be imported: {type(error).__name__}: {error}. Is it installed, or on "
            f"PYTHONPATH? {_FORMS}"
        ) from error


def _call(reference: str, factory: Any) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ModelReferenceError(
            f"{reference!r} is a {type(factory).__name__}, not a function that builds a model. {_FORMS}"
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:  # a user's factory can raise anything
        raise ModelReferenceError(
            f"{reference!r} could not be called without arguments: {type(error).__name__}: {error}. Write a small function "
            f"without arguments that returns the model."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelReferenceError(
            f"{reference!r} returned a {type(model).__name__}, not a torch.nn.Module. "
            f"Name the function that returns the model."
        )
    return model

"""Copies of a model that callbacks keep: averages, which are rewritten along, and others, which a warning names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tdfx.errors import TdfxWarning

_DEPTH = 2
"""How many containers and objects deep a callback is searched."""
_MOST_ITEMS = 10_000
"""Items of a container that are looked at: a Trainer may hold its data in a list."""
_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "transformers", "accelerate", "tdfx")


@dataclass(eq=False)
class CopyHolder:
    """A copy of a module somewhere else, which is read and replaced as the attribute ``module``, as in an average."""

    get: Callable[[], nn.Module]
    """Returns the copy of the whole model or of the module."""
    put: Callable[[nn.Module], None]
    """Puts another copy in its place; not called where ``path`` leads into it."""
    path: str = ""
    """Path of the module in the copy."""

    @property
    def module(self) -> nn.Module:
        """The copy of the module."""
        return self.get().get_submodule(self.path)

    @module.setter
    def module(self, module: nn.Module) -> None:
        if self.path:
            self.get().set_submodule(self.path, module)
        else:
            self.put(module)


@dataclass(frozen=True, slots=True)
class Copies:
    """What is a copy of a model, by names and shapes of its parameters."""

    whole: nn.Module
    """The model that the trainer trains."""
    target: nn.Module
    """The module in it that is rewritten."""

    def averages(self, holders: Sequence[object]) -> list[Any]:
        """Return the averages that some objects keep, as ``rewrite`` takes them: objects with a copy as ``module``.

        An average is an ``AveragedModel``, or another object that keeps a copy under that name, or what a callback calls
        ``_average_model``.
        """
        averages: list[Any] = []
        for holder in holders:
            for path, owner, value in _values(holder):
                if path[-1] == "_average_model" and self._is_copy(value):
                    averages.append(self._holder(owner, path[-1]))
                elif (isinstance(value, nn.Module) or not _is_theirs(value)) and self._is_copy(_module_of(value)):
                    averages.append(self._holder(value, "module"))
        inside = [module for module in self.whole.modules() if isinstance(module, AveragedModel)]
        return averages + [module for module in inside if self._is_like(module.module, self.target)]

    def as_average(self, average: Any) -> Any:
        """Return an average that the user passed as one of the module that is rewritten."""
        return self._holder(average, "module") if isinstance(_module_of(average), nn.Module) else average

    def warn_of_others(self, holders: Sequence[object], known: Sequence[Any]) -> None:
        """Warn of each copy that some objects keep and that will not follow a rewrite; ``known`` are averages that will."""
        kept = {id(average.get() if isinstance(average, CopyHolder) else average.module) for average in known}
        for holder in holders:
            for path, _, value in _values(holder):
                what = self._what(value)
                if what and id(value) not in kept:
                    kept.add(id(value))
                    name = ".".join((type(holder).__name__, *path))
                    warnings.warn(
                        f"{name} holds {what}, and does not follow the switch, after which the model has factors in the "
                        f"place of weights. If it is an average, keep it as a torch.optim.swa_utils.AveragedModel, or pass "
                        f"averaged= to the callback; if it stays as it is, nothing has to be done.",
                        TdfxWarning,
                        stacklevel=2,
                    )

    def _what(self, value: object) -> str:
        if isinstance(value, nn.Module):
            return "a copy of the model" if self._is_copy(value) else ""
        parameters = dict(self.target.named_parameters())
        if isinstance(value, Mapping):
            tensors = {name for name, each in value.items() if isinstance(each, Tensor)}
            names = {*parameters, *dict(self.whole.named_parameters())}
            return "tensors under the names of the model's parameters" if len(tensors & names) > 1 else ""
        if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(each, Tensor) for each in value):
            held = {id(parameter) for parameter in parameters.values()}
            if any(id(each) in held for each in value):
                return "parameters of the model"
            shapes = [each.shape for each in value]
            trained = [parameter.shape for parameter in parameters.values() if parameter.requires_grad]
            whole = [parameter.shape for parameter in self.whole.parameters() if parameter.requires_grad]
            return "tensors of the shapes of the model's parameters" if shapes in (trained, whole) else ""
        return ""

    def _holder(self, owner: Any, name: str) -> CopyHolder:
        copy = getattr(owner, name)
        is_whole = self.target is not self.whole and _shapes(copy) == _shapes(self.whole)
        path = next(path for path, module in self.whole.named_modules() if module is self.target) if is_whole else ""
        return CopyHolder(lambda: getattr(owner, name), lambda module: setattr(owner, name, module), path)

    def _is_copy(self, value: object) -> bool:
        if not any(self._is_like(value, original) for original in (self.whole, self.target)):
            return False
        return not any(value is part for part in self.whole.modules())

    def _is_like(self, value: object, original: nn.Module) -> bool:
        return type(value) is type(original) and _shapes(value) == _shapes(original) != {}


def _module_of(value: object) -> object:
    return getattr(value, "module", None)


def _is_theirs(value: object) -> bool:
    owner = value if isinstance(value, FunctionType) else type(value)
    return isinstance(value, ModuleType) or (owner.__module__ or "").partition(".")[0] in _FRAMEWORKS


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _values(
    holder: object, depth: int = _DEPTH, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the values that an object keeps in attributes, containers and closures: path, owner of the last name, value."""
    if isinstance(holder, Mapping):
        items = [(str(key), value) for key, value in islice(holder.items(), _MOST_ITEMS)]
    elif isinstance(holder, list | tuple | set):
        items = [(str(index), value) for index, value in islice(enumerate(holder), _MOST_ITEMS)]
    elif isinstance(holder, partial):
        items = [*((str(index), value) for index, value in enumerate(holder.args)), *holder.keywords.items()]
    elif isinstance(holder, FunctionType):
        cells = zip(holder.__code__.co_freevars, holder.__closure__ or (), strict=True)
        items = [(name, cell.cell_contents) for name, cell in cells if cell != CellType()]
    else:
        items = list(getattr(holder, "__dict__", {}).items())
    for name, value in items:
        yield (*path, name), holder, value
        is_function = isinstance(value, FunctionType | partial)
        if (
            depth > 1
            and not isinstance(value, nn.Module)
            and not _is_theirs(value)
            and (is_function or not callable(value))
        ):
            yield from _values(value, depth - 1, (*path, name))

"""What must be watched where a forward is run for a look at it: writing to parameters, and code that torch does not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class ParameterGuard(TorchFunctionMode):
    """Raises WritesParameterError before anything is written to a parameter of a module, ``.data`` included."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.storages = {_storage_of(parameter) for parameter in module.parameters()} - {0}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        if args and (in_place or func == Tensor.data.__set__):  # type: ignore[attr-defined]
            written = tree_leaves(args[0])
            if any(isinstance(one, Tensor) and self._is_parameter(one) for one in written):
                raise WritesParameterError(f"its forward changes a parameter ({name})")
        return func(*args, **(kwargs or {}))

    def _is_parameter(self, tensor: Tensor) -> bool:
        return _storage_of(tensor) in self.storages


def _storage_of(tensor: Tensor) -> int:
    """Return where a tensor's values are; 0 for one that has none, as lazy and wrapped ones have not."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer) or is_traceable_wrapper_subclass(tensor):
        return 0
    return tensor.untyped_storage().data_ptr()


class WritesParameterError(RuntimeError):
    """A forward is about to write to a parameter."""


@contextmanager
def custom_functions(seen: Callable[[type[Function], Any], None]) -> Iterator[None]:
    """Call ``seen`` with the class and the arguments of every autograd function of a user's own that is applied."""
    original = Function.__dict__["apply"]

    def apply(kind: type[Function], *args: Any, **named: Any) -> Any:
        seen(kind, (args, named))
        return original.__get__(None, kind)(*args, **named)

    Function.apply = classmethod(apply)
    try:
        yield
    finally:
        Function.apply = original


def refuse_custom_function(kind: type[Function], arguments: Any) -> None:
    """Raise CustomFunctionError: a trace would look into the function's forward, and lose its backward."""
    raise CustomFunctionError(f"its forward applies {kind.__name__}, whose backward a graph would not have")


class CustomFunctionError(RuntimeError):
    """A forward applies an autograd function of its own."""

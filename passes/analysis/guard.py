"""Guards for running a user's forward: no writes to parameters, and no autograd function that goes unseen."""

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


class WritesParameterError(RuntimeError):
    """A forward is about to write to a parameter."""


class CustomFunctionError(RuntimeError):
    """A forward applies a user's own autograd function."""


class ParameterGuard(TorchFunctionMode):
    """Raises WritesParameterError before anything is written to a parameter of a module, ``.data`` included."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.addresses = {storage_address(parameter) for parameter in module.parameters()} - {0}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        if args and (in_place or func == Tensor.data.__set__):  # type: ignore[attr-defined]
            written = [value for value in tree_leaves(args[0]) if isinstance(value, Tensor)]
            if any(storage_address(tensor) in self.addresses for tensor in written):
                raise WritesParameterError(f"its forward changes a parameter ({name})")
        return func(*args, **(kwargs or {}))


def storage_address(tensor: Tensor) -> int:
    """Return the address of a tensor's values; 0 for a tensor without any, such as a lazy one or a wrapper of others."""
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer) or is_traceable_wrapper_subclass(tensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without a storage
        return 0


@contextmanager
def watch_custom_functions(on_apply: Callable[[type[Function], Any], None]) -> Iterator[None]:
    """Call ``on_apply`` with the class and the arguments of every autograd function that Python code applies."""
    original = Function.__dict__["apply"]

    def apply(function: type[Function], /, *args: Any, **kwargs: Any) -> Any:
        on_apply(function, (args, kwargs))
        return original.__get__(None, function)(*args, **kwargs)

    Function.apply = classmethod(apply)
    try:
        yield
    finally:
        Function.apply = original


def refuse_custom_function(function: type[Function], arguments: Any) -> None:
    """Raise CustomFunctionError: a trace would record the function's forward and lose its backward."""
    raise CustomFunctionError(f"its forward applies {function.__name__}, whose backward a graph would not have")

"""Running a user's forward: no writes to parameters, no autograd function that goes unseen, shards gathered on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_any, tree_any_only, tree_map_only

from tdfx.distributed.processes import Processes
from tdfx.layers.parameter import FactorizedParameter
from tdfx.layers.placement import full, is_sharded
from tdfx.passes.analysis.uses import METADATA_FUNCTIONS


class WritesParameterError(RuntimeError):
    """A forward is about to write to a parameter."""


class CustomFunctionError(RuntimeError):
    """A forward applies a user's own autograd function."""


class ParameterGuard(TorchFunctionMode):
    """Raises WritesParameterError before anything is written to a parameter of a module, ``.data`` included."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.addresses = {storage_address(parameter) for parameter in module.parameters()} - {0}
        self.written = ""
        """The function that would have written; "" if there was none."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        in_place = (
            (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or bool(named.get("inplace"))
        )
        written: list[Any] = [named.get("out")]
        if in_place or func == Tensor.data.__set__:  # type: ignore[attr-defined]
            written += [*args[:1], *(named.get(first) for first in ("input", "tensor", "self"))]
        if named.get("max_norm") is not None:  # an embedding scales the rows that it looks up
            written += [*args[:2], named.get("weight")]
        if tree_any_only(Tensor, lambda tensor: storage_address(tensor) in self.addresses, written):
            self.written = name
            raise WritesParameterError(f"its forward changes a parameter ({name})")
        return func(*args, **named)


class GatherShards(TorchFunctionMode):
    """Gathers the sharded parameters that a function takes, for as long as the function runs.

    A process never holds more of the model than the weights of one function. All processes that hold the shards must run
    the same module, on inputs of the same shapes. If the run of one fails, the others raise the failure before the next
    gather, so that no process waits in vain.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in METADATA_FUNCTIONS:
            return func(*args, **named)
        if tree_any_only(FactorizedParameter, lambda _: True, (args, named)):
            with self:  # FactorizedParameter calls functions on its factors
                return FactorizedParameter.__torch_function__(func, types, args, named)
        if tree_any(is_sharded, (args, named)):
            self.processes.raise_pending()
        args, named = tree_map_only(Tensor, lambda x: full(x) if is_sharded(x) else x, (args, named))
        return func(*args, **named)


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


def refuse_custom_function(function: type[Function], _: Any) -> None:
    """Raise CustomFunctionError: a trace would record the function's forward and lose its backward."""
    raise CustomFunctionError(f"its forward applies {function.__name__}, whose backward a graph would not have")

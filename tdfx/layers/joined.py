"""The dense weight of a factorized layer, as code that reads ``layer.weight`` gets it: a value that cannot be written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_any_only, tree_map_only

from tdfx.errors import ModelError

_ASSIGNMENTS = {"__set__", "__setitem__", "__delete__"}
_AUGMENTED = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_AUGMENTED |= {"__ilshift__", "__irshift__"}


class JoinedWeight(Tensor):
    """A weight that was joined from factors for this reading; what is written to it would be lost, so writing raises.

    Its views, ``detach()`` and ``data`` raise too. All that is computed from it is a plain tensor.
    """

    _is_hf_initialized = True
    """Lets Transformers pass by: modules around the layer would initialize it when ``from_pretrained`` loads a model."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _ASSIGNMENTS | _AUGMENTED
        first = args[:1] or tuple(named.values())[:1]
        written = (first if in_place else (), named.get("out"))
        if tree_any_only(cls, lambda _: True, written):
            raise ModelError(
                f"{name} would write to the dense weight of a factorized layer, which is joined from the factors at each "
                f"reading, so the change would be lost. Change the layer's factors, write to a clone() of the weight, or "
                f"keep the layer dense: Policy(exclude=...)."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **named)
            if isinstance(result, np.ndarray):
                result.flags.writeable = False
            sources = {_address(value) for value in args if isinstance(value, cls)}
            return tree_map_only(
                Tensor, lambda value: value.as_subclass(cls) if _address(value) in sources else value, result
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            copied: Tensor = self.as_subclass(Tensor).__deepcopy__(memo)  # type: ignore[no-untyped-call]
            return copied


def read_only(weight: Tensor) -> Tensor:
    """Return a weight as a ``JoinedWeight``; as it is where a compiler or an exporter follows the code."""
    if torch.compiler.is_compiling():
        return weight
    return weight.as_subclass(JoinedWeight)


def _address(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor; its own identity if it has none."""
    try:
        address: int = tensor.untyped_storage()._cdata
        return address
    except (RuntimeError, NotImplementedError):  # a subclass without a storage
        return id(tensor)

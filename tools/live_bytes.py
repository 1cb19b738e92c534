"""Counting the bytes of tensors that are alive, exactly, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is entered, the bytes of every tensor that is made, until the last that shares its memory is gone.

    Storages are watched, not tensors, so views count once, and so does what only autograd still holds. What a kernel
    takes for itself and gives back before it returns is not seen.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """Begin with tensors that were made before."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """The bytes that are alive."""
        self.peak = 0
        """The most that were, since the last ``begin``."""
        self._known: set[int] = set()
        for tensor in held:
            self._watch(tensor)

    def begin(self) -> int:
        """Forget the peak, and return what is alive."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and watch what it returns."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._watch, result)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # torch gives back the same object for one storage as long as anything, autograd too, holds that.
        key = id(storage)
        if tensor.is_meta or key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count

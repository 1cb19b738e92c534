"""Count the bytes of live tensors, exactly, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is active, the bytes of every tensor that is created, until its storage is freed.

    It watches storages and not tensors, so that views count once, and what only autograd holds counts too. Scratch memory
    that a kernel frees before it returns is not seen.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes that are live now."""
        self.peak = 0
        """The most bytes that were live since the last ``begin``."""
        self._storages: set[int] = set()
        for tensor in existing:
            self._watch(tensor)

    def begin(self) -> int:
        """Reset the peak, and return the bytes that are live."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._watch, result)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # torch returns the same object for a storage as long as anything holds it, autograd included.
        key = id(storage)
        if tensor.is_meta or key in self._storages:
            return
        self._storages.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, count: int) -> None:
        self._storages.discard(key)
        self.now -= count

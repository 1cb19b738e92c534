"""Running a module whose parameters are in shards, one function at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only

from tdfx.distributed.processes import Processes
from tdfx.layers.parameter import FactorizedParameter
from tdfx.layers.placement import full, is_sharded
from tdfx.passes.analysis.uses import METADATA_FUNCTIONS


class GatherShards(TorchFunctionMode):
    """Gathers the sharded parameters that a function takes, for as long as the function runs.

    A process never holds more of the model than the weights of one function. All processes that hold the shards must run
    the same module, on inputs of the same shapes, under this mode.

    Args:
        processes: The processes that hold the shards. If the run of one fails, the others raise the failure before the
            next gather, so that no process waits in vain.
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
        if tree_any(lambda value: isinstance(value, FactorizedParameter), (args, named)):
            with self:  # FactorizedParameter calls functions on its factors
                return FactorizedParameter.__torch_function__(func, types, args, named)
        if tree_any(is_sharded, (args, named)):
            self.processes.raise_pending()
        args, named = tree_map_only(Tensor, _gathered, (args, named))
        return func(*args, **named)


def _gathered(tensor: Tensor) -> Tensor:
    return full(tensor) if is_sharded(tensor) else tensor

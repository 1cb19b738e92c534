"""Running a module whose parameters are in shards, one function at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only

from tdfx.distributed.processes import Ready, unasked
from tdfx.layers.parameter import FactorizedParameter
from tdfx.layers.placement import full, is_sharded
from tdfx.passes.analysis.uses import METADATA_FUNCTIONS


class GatherShards(TorchFunctionMode):
    """Gives every function the values of the parameters that it takes, for as long as it runs and no longer.

    So no process ever has more of the model than the weights of one function. The processes that hold the shards must run
    the same module, on inputs of the same shapes, under this.

    Args:
        ready: What to call before values are gathered, so that nobody waits for a process whose run has failed.
    """

    def __init__(self, ready: Ready = unasked) -> None:
        super().__init__()
        self.ready = ready

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in METADATA_FUNCTIONS:
            return func(*args, **named)
        if tree_any(lambda one: isinstance(one, FactorizedParameter), (args, named)):
            with self:  # it calls functions with weights of its own
                return FactorizedParameter.__torch_function__(func, types, args, named)
        if tree_any(is_sharded, (args, named)):
            self.ready()
        args, named = tree_map_only(Tensor, _values, (args, named))
        return func(*args, **named)


def _values(tensor: Tensor) -> Tensor:
    return full(tensor) if is_sharded(tensor) else tensor

"""The torch.fx tracer that keeps every site as one call, and notes what a graph would not do again."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves

from tdfx.kinds.registry import find_kind
from tdfx.layers.copying import HOOKS, structural_copy
from tdfx.layers.factorized import Factorized
from tdfx.passes.analysis.modes import Mode


class SiteTracer(fx.Tracer):
    """Keeps every layer that can be a site, and every factorized one, as one call in the graph.

    Args:
        whole: Classes of modules to keep as one call besides.
        whole_paths: Paths of such modules.
    """

    def __init__(self, whole: Collection[type[nn.Module]] = (), whole_paths: Collection[str] = ()) -> None:
        super().__init__()
        self.whole = whole
        self.whole_paths = whole_paths
        self.kept_whole: dict[str, nn.Module] = {}
        """The modules that were kept as one call for these arguments' sake, by path."""
        self.mismatches: dict[str, str] = {}
        """Path of a module -> what it did while it was traced that a graph would not do again."""
        self.deciders: set[str] = set()
        """Paths of the modules whose mode decided something."""
        self.failed_at: str | None = None
        """The path of the innermost module whose forward raised an error; None for the root."""
        self._open: list[str] = []
        self._contexts = _contexts()

    def trace_in_mode(self, root: nn.Module, training: bool) -> fx.Graph:
        """Trace a throwaway copy in a mode; each of its modules notes when its own mode decides something."""
        for path, one in root.named_modules():
            one.__dict__["training"] = Mode(training, path, self._decided)
        return self.trace(root)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat sites, factorized layers, torch.nn's own layers, and what was asked for as one call."""
        if is_site_or_leaf(m):
            return True
        if type(m) in self.whole or module_qualified_name in self.whole_paths:
            self.kept_whole[module_qualified_name] = m
            return True
        return False

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep count of where the trace is, and note a forward that draws random numbers by itself."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            # Its forward is not run; what holds now was brought about by the module that calls it.
            return super().call_module(m, forward, args, kwargs)
        self._open.append(path)
        known, states = len(self.mismatches), random_states()
        try:
            result = super().call_module(m, forward, args, kwargs)
            if self._hands_out_a_decision(path, result):
                self.mismatch("gives back a number that its mode may have decided")
            if len(self.mismatches) == known and random_states() != states:
                self.mismatch("draws random numbers that a graph would freeze")
        except Exception:
            self.failed_at = self.failed_at or self._open[-1]
            raise
        finally:
            self._open.pop()
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note an operation that runs under a gradient mode, an autocast or a checkpoint of the forward's own."""
        if _contexts() != self._contexts:
            self.mismatch("switches autocast, gradients or checkpointing on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Note a tensor that the forward makes, which would stand in the graph as a constant; keep a container's class."""
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        if isinstance(a, dict | list) and type(a) not in {dict, list, immutable_dict, immutable_list}:
            raise TypeError(f"a {type(a).__name__} would become a plain {'dict' if isinstance(a, dict) else 'list'}")
        made = super().create_arg(a)
        if isinstance(a, Tensor) and isinstance(made, fx.Node) and "_tensor_constant" in str(made.target):
            self.mismatch("makes tensors that a graph would freeze")
        return made

    def _decided(self, path: str) -> None:
        """Note that a module's mode decided something; a graph has no place for that of one whose forward is not running."""
        self.deciders.add(path)
        if path and path not in self._open:
            self.mismatch("asks for the mode of another module")

    def _hands_out_a_decision(self, path: str, result: Any) -> bool:
        """Return True if a module whose mode, or that of one inside it, decided something gives back a number."""
        decided = any(one == path or one.startswith(f"{path}.") for one in self.deciders)
        return decided and any(isinstance(one, int | float) for one in tree_leaves(result))

    def mismatch(self, why: str) -> None:
        """Note a doubt about the module whose forward is running."""
        self.mismatches.setdefault(self._open[-1] if self._open else "", f"its forward {why}")


def is_site_or_leaf(module: nn.Module) -> bool:
    """Return True for modules that no graph looks into: single layers, factorized layers, and torch.nn's own."""
    if isinstance(module, Factorized):
        return True
    if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        # A list or a dictionary of modules computes nothing itself; what it holds is called by others.
        return False
    kind = find_kind(module)
    if kind is not None:
        return kind.is_intact(module)
    return bool(fx.Tracer().is_leaf_module(module, ""))


def scratch_copy(module: nn.Module, mode: bool) -> nn.Module:
    """Return a structural copy to run or trace: in the given mode, with buffers of its own.

    What a lazy layer will make real at its first run is the copy's own, too. The mode is set on each module by itself,
    since a user's own ``train`` may change the tensors that the copy shares.
    """
    made = structural_copy(module)
    buffers: dict[int, torch.Tensor] = {}
    for one in made.modules():
        one.training = mode
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = buffers.setdefault(id(buffer), _own_buffer(buffer))
        for name, parameter in one._parameters.items():
            if isinstance(parameter, UninitializedParameter):
                one._parameters[name] = copy.deepcopy(parameter)
    return made


def with_own_parameters(module: nn.Module) -> dict[int, int]:
    """Give a throwaway copy parameters of its own, and return whose copy each of them is, by identity."""
    own: dict[int, nn.Parameter] = {}
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None and not isinstance(parameter, UninitializedParameter):
                if id(parameter) not in own:
                    own[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                one._parameters[name] = own[id(parameter)]
    return {id(made): original for original, made in own.items()}


def _own_buffer(buffer: Tensor) -> Tensor:
    if isinstance(buffer, UninitializedBuffer):
        made: Tensor = UninitializedBuffer(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
        return made
    return buffer.clone()


def without_hooks(module: nn.Module) -> nn.Module:
    """Take all hooks off a throwaway copy: they are a user's own code, and must not be called with a Proxy."""
    for one in module.modules():
        for name in HOOKS:
            value = one.__dict__[name]
            one.__dict__[name] = type(value)() if hasattr(value, "clear") else value
    return module


def _contexts() -> tuple[object, ...]:
    """Return what decides how an operation runs, and what is kept of it for backward, besides its arguments."""
    autocast = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    checkpoint = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, checkpoint


def random_states() -> tuple[object, ...]:
    """Return the states of the random generators of torch (CPU), Python and NumPy, to be compared."""
    _, keys, *rest = np.random.get_state(legacy=True)
    return torch.random.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), rest

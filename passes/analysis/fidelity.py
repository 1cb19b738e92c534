"""Checks of whether a graph does what a module's own code does; wherever it might not, the code is kept."""

from __future__ import annotations

import inspect

from torch import fx, nn
from torch.nn.parameter import UninitializedBuffer

from tdfx.layers.module_state import HOOKS, MODULE_STATE
from tdfx.passes.analysis.sandbox import random_states

_CALL_METHODS = frozenset({"__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward", "_compiled_call_impl"})
"""Methods through which nn.Module is called; a graph calls the operations inside a block, and none of these."""
_GRAPH_NAMES = frozenset({"__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__"}) | {
    name
    for name in {*vars(fx.GraphModule(nn.Module(), fx.Graph())), *vars(fx.GraphModule), "_graph_state", "_body_class"}
    if not name.startswith("__") and name not in MODULE_STATE and name not in vars(nn.Module)
}
"""Names that a GraphModule uses for its own state; a model that uses one of them cannot become a graph."""


class ForwardMonitor:
    """What a module holds before it is traced, to be compared with what it holds afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = _attributes(module)
        self.versions = _versions(module)
        self.random_states = random_states()

    def mismatches(self) -> dict[str, str]:
        """Return what forwards have changed meanwhile, which a graph would not do again: path of the module -> what."""
        mismatches: dict[str, str] = {}
        changed = set(_attributes(self.module).items()) ^ set(self.attributes.items())
        for path, name in sorted(key for key, _ in changed):
            if not name.startswith("_tensor_constant"):  # set by the tracer, which records a mismatch itself
                mismatches.setdefault(path, f"its forward changes its own attribute {name!r}")
        for path, version in _versions(self.module).items():
            if version != self.versions[path]:
                mismatches.setdefault(path, "its forward changes a buffer")
        return mismatches

    def drew_random_numbers(self) -> bool:
        """Return True if a random generator has moved meanwhile."""
        return random_states() != self.random_states


def mismatch_of_root(module: nn.Module) -> str:
    """Return why no graph can stand for a module whose forward traces; "" if one can."""
    if isinstance(module, fx.GraphModule):
        return ""
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            return f"its forward has the optional argument {parameter.name!r}, and a graph would fix one case of it"
    names = {*_own_names(type(module)), *module.__dict__, *module._modules, *module._parameters, *module._buffers}
    if taken := sorted(names & _GRAPH_NAMES):
        return f"its attribute {taken[0]!r} has a name that GraphModule uses itself"
    if slots := next((base for base in _user_classes(type(module)) if vars(base).get("__slots__")), None):
        return f"{slots.__name__} has __slots__, which a GraphModule has no place for"
    return _mismatch_of_code(module)


def mismatch_of_block(module: nn.Module) -> str:
    """Return why a graph must call a module inside it as it is; "" if the graph may do what its forward does."""
    if any(module.__dict__[name] for name in HOOKS):
        return "it has hooks, which a graph would not call"
    return _mismatch_of_code(module)


def _mismatch_of_code(module: nn.Module) -> str:
    kind: type = type(module)
    if overridden := _CALL_METHODS & _own_names(kind):
        return f"{kind.__name__} has its own {min(overridden)}(), which a graph would not call"
    return ""


def _user_classes(kind: type) -> list[type]:
    """Return a class and its bases, without those of torch.nn."""
    return [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.nn")]


def _own_names(kind: type) -> set[str]:
    return {name for base in _user_classes(kind) for name in vars(base)}


def _attributes(root: nn.Module) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the identity and the length of every attribute of every submodule, by path and name."""
    return {
        (path, name): (id(value), len(value) if isinstance(value, list | dict | set) else 0)
        for path, module in root.named_modules()
        for name, value in module.__dict__.items()
        if name not in MODULE_STATE
    }


def _versions(root: nn.Module) -> dict[str, int]:
    """Return how often the buffers of each submodule were changed in place."""
    versions = {}
    for path, module in root.named_modules():
        buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
        versions[path] = sum(buffer._version for buffer in buffers if not isinstance(buffer, UninitializedBuffer))
    return versions

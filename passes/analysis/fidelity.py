"""Would a graph do what the module does? What a trace cannot see is looked for here; when in doubt the class is kept."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any, TypeGuard

from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer

from tdfx.layers.copying import HOOKS, MODULE_STATE
from tdfx.passes.analysis.tracer import random_states

_CALLING = frozenset({"__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward", "_compiled_call_impl"})
"""Methods of nn.Module by which it is called; a graph calls none of its blocks by them."""
_UNSEEN = frozenset({"is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"})
"""Names in a model's code that change how it runs and leave no trace in a graph."""
_COPYING = frozenset({"__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__"})
_GRAPH_NAMES = _COPYING | {
    name
    for name in {
        *fx.GraphModule(nn.Module(), fx.Graph()).__dict__,
        *vars(fx.GraphModule),
        "_graph_state",
        "_body_class",
    }
    if not name.startswith("__") and name not in MODULE_STATE and name not in vars(nn.Module)
}
"""Names by which a GraphModule holds its own state; a model that uses one of them cannot become a graph."""


class ForwardMonitor:
    """What a module holds before it is traced, to be compared with what it holds afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = _attributes(module)
        self.versions = _versions(module)
        self.random = random_states()

    def mismatches(self) -> dict[str, str]:
        """Return what the forward did while it was traced that a graph would not do again, by the module it concerns."""
        found: dict[str, str] = {}
        now = _attributes(self.module)
        for path, name in sorted(key for key, _ in set(now.items()) ^ set(self.attributes.items())):
            if not name.startswith("_tensor_constant"):  # the tracer's own, and noted by it
                found.setdefault(path, f"its forward changes its own attribute {name!r}")
        for path, version in _versions(self.module).items():
            if version != self.versions[path]:
                found.setdefault(path, "its forward changes a buffer")
        return found

    def drew(self) -> bool:
        """Return True if random numbers were drawn."""
        return random_states() != self.random


def mismatch_of_root(module: nn.Module) -> str:
    """Return why a graph could not stand for a module although its forward traces; "" if it can."""
    if isinstance(module, fx.GraphModule):
        return ""
    optional = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    ]
    if optional:
        return f"its forward has the optional argument {optional[0]!r}, and a graph would fix one case of it"
    own = {name for base in _user_classes(type(module)) for name in vars(base)}
    own |= {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
    if taken := sorted(own & _GRAPH_NAMES):
        return f"its attribute {taken[0]!r} has a name that GraphModule uses itself"
    return _doubt_of_code(module)


def mismatch_of_block(module: nn.Module) -> str:
    """Return why a module inside a graph must be called as it is; "" if the graph may do what its forward does."""
    if any(module.__dict__[name] for name in HOOKS):
        return "it has hooks, which a graph would not call"
    return _doubt_of_code(module)


def _doubt_of_code(module: nn.Module) -> str:
    kind: type = type(module)
    if own := _CALLING & {name for base in _user_classes(kind) for name in vars(base)}:
        return f"{kind.__name__} has its own {min(own)}(), which a graph would not call"
    if unseen := _unseen(kind):
        return f"{kind.__name__} uses {unseen}, which leaves no trace in a graph"
    return ""


def _user_classes(kind: type) -> list[type]:
    """Return a class and its bases as far as they are not torch's own."""
    return [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.nn")]


@lru_cache(maxsize=1024)
def _unseen(kind: type) -> str:
    """Return the first name in a class's code that changes how it runs without leaving a trace."""
    for base in _user_classes(kind):
        for function in vars(base).values():
            if inspect.isfunction(function) and (found := _unseen_in(function)):
                return found
    return ""


def _unseen_in(function: Any) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made at run time, without a source to read
        return ""
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name in _UNSEEN:
            return name
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "isinstance"
            and "Tensor" in ast.unparse(node.args[1])
        ):
            return "isinstance(..., Tensor)"
        if isinstance(node, ast.Compare) and "training is " in ast.unparse(node):
            return "`training is`"
    return ""


def _attributes(module: nn.Module) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the identity and length of every attribute of every submodule."""
    return {
        (path, name): (id(value), len(value) if isinstance(value, list | dict | set) else 0)
        for path, one in module.named_modules()
        for name, value in one.__dict__.items()
        if name not in MODULE_STATE
    }


def _versions(module: nn.Module) -> dict[str, int]:
    """Return how often the buffers of each submodule were changed in place."""
    return {
        path: sum(buffer._version for buffer in one._buffers.values() if _has_version(buffer))
        for path, one in module.named_modules()
    }


def _has_version(buffer: Tensor | None) -> TypeGuard[Tensor]:
    return buffer is not None and not isinstance(buffer, UninitializedBuffer)

"""Would a graph do what the module does? What a trace cannot see is looked for here; when in doubt the class is kept."""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedBuffer

from tdfx.passes.tracer import is_site_or_leaf
from tdfx.structure import HOOKS, MODULE_STATE

_OWN_METHODS = frozenset({"__init__", "forward", "extra_repr"})
"""What a module class may define for itself without changing how a module behaves otherwise."""
_UNSEEN = frozenset(
    {"autocast", "no_grad", "enable_grad", "inference_mode", "set_grad_enabled", "is_grad_enabled", "checkpoint"}
)
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


class Watch:
    """What a module holds before it is traced, to be compared with what it holds afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = _attributes(module)
        self.versions = _versions(module)
        self.random = _random_states()

    def doubt(self) -> str:
        """Return what the forward did while it was traced that a graph would not do again; "" if nothing."""
        now = _attributes(self.module)
        if any(name.startswith("_tensor_constant") for _, name in now.keys() - self.attributes.keys()):
            return "its forward makes tensors that a graph would freeze"
        if now != self.attributes:
            changed = min(name for (_, name), _ in set(now.items()) ^ set(self.attributes.items()))
            return f"its forward changes its own attribute {changed!r}"
        if _versions(self.module) != self.versions:
            return "its forward changes a buffer"
        if _random_states() != self.random:
            return "its forward draws random numbers that a graph would freeze"
        return ""


def static_doubt(module: nn.Module) -> str:
    """Return why a graph could not stand for a module although its forward traces; "" if it can."""
    if isinstance(module, fx.GraphModule):
        return ""
    inner = [child for child in module.modules() if not is_site_or_leaf(child)]
    if any(child.__dict__[name] for child in inner if child is not module for name in HOOKS):
        return "a block inside it has hooks, which a graph would not call"
    optional = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    ]
    if optional:
        return f"its forward has the optional argument {optional[0]!r}, and a graph would fix one case of it"
    kinds: dict[type, None] = {type(child): None for child in inner}
    for kind in kinds:
        if overridden := _overridden(kind):
            return f"{kind.__name__} has its own {overridden}(), which a graph would not call"
        if unseen := _unseen(kind):
            return f"{kind.__name__} uses {unseen}, which leaves no trace in a graph"
    own = {name for base in _user_classes(type(module)) for name in vars(base)}
    own |= {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
    if taken := sorted(own & _GRAPH_NAMES):
        return f"its attribute {taken[0]!r} has a name that GraphModule uses itself"
    return ""


def _user_classes(kind: type) -> list[type]:
    """Return a class and its bases as far as they are not torch's own."""
    return [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.nn")]


def _overridden(kind: type) -> str:
    """Return a method of nn.Module that a class or its bases redefine."""
    plumbing = set(vars(nn.Module)) - _OWN_METHODS
    found = [
        name
        for base in _user_classes(kind)
        for name, value in vars(base).items()
        if name in plumbing and inspect.isfunction(value)
    ]
    return min(found, default="")


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
    return ""


def _attributes(module: nn.Module) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the identity and length of every attribute of every submodule."""
    return {
        (path, name): (id(value), len(value) if isinstance(value, list | dict | set) else 0)
        for path, one in module.named_modules()
        for name, value in one.__dict__.items()
        if name not in MODULE_STATE
    }


def _versions(module: nn.Module) -> list[int]:
    return [buffer._version for buffer in module.buffers() if not isinstance(buffer, UninitializedBuffer)]


def _random_states() -> tuple[bytes, object, str]:
    return torch.random.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state(legacy=True))

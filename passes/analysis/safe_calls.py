"""What a forward may call in a trace: only what a graph repeats, or what computes alike each time."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

from tdfx.passes.analysis.source import TORCH, is_users_file

_PURE_BUILTINS = (
    "abs all any bool dict divmod enumerate float frozenset int len list map filter max min pow range reversed round set "
    "slice sorted sum super tuple zip"
)
LOOKING = {"isinstance", "issubclass", "type", "hasattr", "callable", "getattr", "str", "repr", "format", "hash"}
"""Built-in functions that look at a value without leaving a trace; of what flows through, they would see the tracer's."""
PURE_METHODS = frozenset(
    {"items", "keys", "values", "get", "copy", "index", "count", "startswith", "endswith", "split", "join", "format"}
    | {"lower", "upper", "replace", "strip"}
)
"""Methods of Python's own types that change nothing."""
MUTATING_METHODS = frozenset(
    {
        "append",
        "appendleft",
        "extend",
        "extendleft",
        "insert",
        "update",
        "setdefault",
        "pop",
        "popleft",
        "popitem",
        "add",
    }
    | {"remove", "discard", "clear", "reverse", "sort", "rotate", "move_to_end"}
    | {"difference_update", "intersection_update", "symmetric_difference_update"}
)
"""Methods of Python's own containers that change them."""
_MODULE_METHODS = frozenset(
    {"forward", "__call__", "__getattr__", "__getitem__", "__iter__", "__len__", "items", "keys", "values"}
    | {"children", "named_children", "modules", "named_modules", "get_submodule"}
)
"""Methods of nn.Module that a forward may call; those that list parameters are not among them."""
_KEEPING_METHODS = frozenset(
    {"backward", "register_hook", "register_post_accumulate_grad_hook", "apply_", "map_", "map2_", "set_"}
)
"""Methods of tensors that do something beside their result, or call functions that a graph does not show."""
CONTAINERS = (
    list,
    dict,
    set,
    deque,
    tuple,
    str,
    bytes,
    int,
    float,
    complex,
    frozenset,
    range,
    slice,
    types.MappingProxyType,
)


@cache
def _torch_functions() -> frozenset[Any]:
    """Return the functions and methods of torch that a graph records where they get what flows through."""
    with warnings.catch_warnings(action="ignore"):
        listed = get_overridable_functions()
    functions = {function for functions in listed.values() for function in functions if callable(function)}
    is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]
    return frozenset(functions) | {torch._assert, is_scripting, torch._jit_internal.is_scripting}


@cache
def torch_codes() -> frozenset[types.CodeType]:
    """Return the code of those that are written in Python."""
    return frozenset(each.__code__ for each in _torch_functions() if isinstance(each, types.FunctionType))


@cache
def tensor_methods() -> frozenset[str]:
    """Return the names of the methods of a tensor that a graph records."""
    methods = {
        function.__name__ for function in _torch_functions() if hasattr(Tensor, getattr(function, "__name__", ""))
    }
    return frozenset(name for name in methods if not name.startswith("__")) - _KEEPING_METHODS


@cache
def _pure_functions() -> frozenset[Any]:
    named = {getattr(builtins, name) for name in (*_PURE_BUILTINS.split(), *LOOKING)}
    maths = {value for value in vars(math).values() if callable(value)}
    operators = {
        value
        for name, value in vars(operator).items()
        if callable(value) and not name.startswith("_") and not (name.startswith("i") and hasattr(operator, name[1:]))
    }
    changing = {operator.setitem, operator.delitem, operator.concat, operator.iconcat, operator.is_, operator.is_not}
    made = {
        OrderedDict,
        torch.Size,
        torch.device,
        torch.finfo,
        torch.iinfo,
        torch.arange,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.empty,
        torch.tensor,
        torch.eye,
    }
    return frozenset(named | maths | operators | made) - changing


def refusal_of_callable(function: Any) -> str:
    """Return why a trace must not call a function; "" if it may.

    Functions that are written in Python, outside of torch, may be called: their own code is read before it runs.
    """
    function = _unwrapped(function)
    if function is None:
        return ""  # an optional layer that this block does not have: calling it raises an error
    if isinstance(function, nn.Module):
        return ""  # the tracer decides what becomes of a module
    if isinstance(function, functools.partial):
        return refusal_of_callable(function.func)
    if _is_listed(function):
        return ""
    if isinstance(function, types.MethodType):
        if isinstance(function.__self__, nn.Module) and is_of_torch(function.__func__):
            return "" if function.__name__ in _MODULE_METHODS else f"calls {function.__name__}() of a module"
        return refusal_of_callable(function.__func__)
    if isinstance(function, types.FunctionType):
        if not is_of_torch(function):
            return ""
        return f"calls {_name(function)}(), which leaves no trace in a graph"
    if isinstance(function, type):
        if issubclass(function, tuple) and hasattr(function, "_fields"):
            return ""
        is_module = issubclass(function, nn.Module)
        return f"makes a {function.__name__}" + ("" if is_module else ", an object that a graph cannot make again")
    if isinstance(function, types.BuiltinMethodType | types.MethodDescriptorType):
        return _refusal_of_builtin(function)
    own_call = inspect.getattr_static(type(function), "__call__", None)
    if isinstance(own_call, types.FunctionType) and not is_of_torch(own_call):
        return ""
    return f"calls {_name(function)}(), which leaves no trace in a graph"


def _refusal_of_builtin(function: Any) -> str:
    owner, name = getattr(function, "__self__", None), function.__name__
    if isinstance(owner, types.ModuleType | types.NoneType) or not isinstance(owner, CONTAINERS):
        return f"calls {name}(), which leaves no trace in a graph"
    return f"changes a container by {name}()" if name in MUTATING_METHODS else ""


def _unwrapped(function: Any) -> Any:
    """Return the function behind the wrapper by which torch.fx records calls of it."""
    code = getattr(function, "__code__", None)
    while code is not None and code.co_filename.startswith(f"{TORCH}fx/") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        code = getattr(function, "__code__", None)
    return function


def _is_listed(function: Any) -> bool:
    try:
        return function in _torch_functions() or function in _pure_functions()
    except TypeError:  # it cannot be hashed
        return False


def is_of_torch(function: Any) -> bool:
    """Return True for a function that is written in Python in torch, and is no forward of a layer."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(TORCH) and not is_users_file(code.co_filename)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)

"""The torch.fx tracer that keeps every site as one call, and records what a graph would not do again."""

from __future__ import annotations

import dis
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Attribute
from torch.utils._pytree import tree_leaves

from tdfx.kinds.attention import is_transformer_block
from tdfx.kinds.registry import find_kind
from tdfx.layers import assignments
from tdfx.layers.assignments import unpacked
from tdfx.layers.factorized import Factorized
from tdfx.passes.analysis.code_reader import UnsafeCodeError, refuse_wrapped_forward
from tdfx.passes.analysis.modes import Mode
from tdfx.passes.analysis.process_settings import AUTOCAST_KINDS
from tdfx.passes.analysis.sandbox import random_states

_TENSOR_ATTRIBUTES = frozenset(
    name for name in dir(Tensor) if not name.startswith("__") and not callable(getattr(Tensor, name))
)
"""Names of the attributes of tensors that are no methods, such as ``shape`` and ``T``."""


_NAMES_OF_CODE = frozenset({"inf", "nan", "NoneType", "torch", "device", "fx_pytree", "pytree"})
"""Names that the code of a graph gives to what it needs."""
_LITERALS = (bool, int, float, complex, str)


class HiddenLayerError(RuntimeError):
    """A forward calls a layer of the model through an object that was shared, not copied."""


class RecordingProxy(fx.Proxy):
    """Stands for data in a trace; it records assignments in place, and refuses those to attributes."""

    _own = frozenset({"node", "tracer"})

    def __hash__(self) -> int:
        raise UnsafeCodeError("its forward looks up a value that flows through it")

    def __str__(self) -> str:
        raise UnsafeCodeError("its forward makes a text of a value that flows through it")

    def __format__(self, spec: str) -> str:
        """Return a text for the message of an assertion; of any other text the code is refused."""
        return repr(self)

    def __iter__(self) -> Iterator[Any]:
        frame = cast("types.FrameType", inspect.currentframe()).f_back
        assert frame is not None
        code = next(each for each in dis.get_instructions(frame.f_code) if each.offset == frame.f_lasti)
        if code.opname != "UNPACK_SEQUENCE":
            return self.tracer.iter(self)  # which refuses it
        is_shape = self.node.target == "size" or (self.node.target is getattr and self.node.args[1] == "shape")
        parts: Any = self if is_shape else self.tracer.create_proxy("call_function", unpacked, (self, code.argval), {})
        return iter([parts[index] for index in range(code.argval)])

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._own:
            raise UnsafeCodeError(f"its forward assigns to {name!r} of a value that flows through it")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> fx.Proxy:  # type: ignore[override]
        """Return what stands for an attribute; that of a tensor is read at once, before an operation in place changes it."""
        if name in _TENSOR_ATTRIBUTES:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return RecordingAttribute(self, name)


class RecordingAttribute(RecordingProxy, Attribute):
    """Stands for a method that is to be called, or for an attribute of something that is no tensor."""

    _own = frozenset({"root", "attr", "tracer", "_node"})


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def assign(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


for _function in assignments.BY_OPERATOR:
    setattr(RecordingProxy, f"__{_function.__name__}__", _in_place(_function))


class SiteTracer(fx.Tracer):
    """Keeps every layer that can be a site, every factorized layer and every opaque module as one call in the graph."""

    proxy_buffer_attributes = True
    """A forward that asks for the value of a buffer cannot be traced, where it would get the present one for good."""

    def __init__(self, opaque_classes: Collection[type[nn.Module]] = (), opaque_paths: Collection[str] = ()) -> None:
        super().__init__()
        self.opaque_classes = opaque_classes
        self.opaque_paths = opaque_paths
        self.opaque_modules: dict[str, nn.Module] = {}
        """Path -> module, of the opaque modules that the graph calls."""
        self.mismatches: dict[str, str] = {}
        """Path of a module -> what its forward did that a graph would not do again."""
        self.mode_users: set[str] = set()
        """Paths of the modules whose own mode decided something."""
        self.entered: set[str] = {""}
        """Paths of the modules whose forward has run."""
        self.failed_at: str | None = None
        """Path of the innermost module whose forward raised an error; None for the root."""
        self.parameters: frozenset[int] = frozenset()
        """The parameters of the model that is traced, by identity."""
        self._running: list[str] = []
        self._context = _execution_context()

    def trace_in_mode(self, scratch: nn.Module, training: bool) -> fx.Graph:
        """Trace a scratch copy in a mode, and record which modules' own modes decide something."""
        self.parameters = frozenset(map(id, scratch.parameters()))
        for path, module in scratch.named_modules():
            module.__dict__["training"] = Mode(training, path, self._record_mode_use)
        graph = self.trace(scratch)
        keep_former_values(graph)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat sites, factorized layers, torch.nn's own layers and opaque modules as one call."""
        if is_site_or_leaf(m):
            return True
        if type(m) in self.opaque_classes or module_qualified_name in self.opaque_paths:
            self.opaque_modules[module_qualified_name] = m
            return True
        return False

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep track of which forward is running, and record a mismatch if it draws random numbers itself."""
        path = self._path_of(m)
        if _has_own_call(type(m)):  # which is running now, and would run once more where the graph calls the module
            raise UnsafeCodeError(f"its forward calls a {type(m).__name__}, which has its own __call__()")
        if self.is_leaf_module(m, path):  # its forward does not run
            return super().call_module(m, forward, args, kwargs)
        self._running.append(path)
        self.entered.add(path)
        mismatches_before, states_before = len(self.mismatches), random_states()
        try:
            refuse_wrapped_forward(m)
            result = super().call_module(m, forward, args, kwargs)
            if self._may_return_its_mode(path, result):
                self._record_mismatch("returns a number that may depend on its mode")
            if len(self.mismatches) == mismatches_before and random_states() != states_before:
                self._record_mismatch("draws random numbers that a graph would freeze")
        except Exception:
            self.failed_at = self.failed_at or self._running[-1]
            raise
        finally:
            self._running.pop()
        return result

    def _path_of(self, module: nn.Module) -> str:
        try:
            return self.path_of_module(module)
        except NameError as error:
            if any(parameter in self.parameters for parameter in map(id, module.parameters())):
                raise HiddenLayerError(type(module).__name__) from error
            raise UnsafeCodeError(f"its forward calls a {type(module).__name__} that is no submodule") from error

    @property
    def running(self) -> str:
        """The path of the module whose forward is running."""
        return self._running[-1] if self._running else ""

    def proxy(self, node: fx.Node) -> RecordingProxy:
        """Return what stands for data in this trace."""
        return RecordingProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a mismatch if the operation runs under a gradient mode, autocast or checkpoint of the forward's own."""
        if _execution_context() != self._context:
            self._record_mismatch("switches autocast, gradients or checkpointing on or off")
        if args[0] == "placeholder" and args[1] in _NAMES_OF_CODE:
            raise UnsafeCodeError(f"its argument {args[1]!r} has a name that the code of a graph uses itself")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Record a mismatch for a tensor that the forward makes, which becomes a constant; keep the class of containers."""
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        if isinstance(a, dict | list) and type(a) not in {dict, list, immutable_dict, immutable_list}:
            raise TypeError(f"a {type(a).__name__} would become a plain {'dict' if isinstance(a, dict) else 'list'}")
        for value in a.keys() if isinstance(a, dict) else [a]:
            if _is_no_literal(value):
                raise UnsafeCodeError(
                    f"its forward uses a {type(value).__name__}, which the code of a graph cannot hold"
                )
        argument = super().create_arg(a)
        if isinstance(a, Tensor) and isinstance(argument, fx.Node) and "_tensor_constant" in str(argument.target):
            self._record_mismatch("makes tensors that a graph would freeze")
        elif isinstance(a, torch.Generator):
            self._record_mismatch("draws from a random generator of its own, which a graph cannot hold")
        return argument

    def _record_mode_use(self, path: str) -> None:
        """Record that a module's mode decided something; a mismatch if the forward of that module is not running."""
        self.mode_users.add(path)
        if path and path not in self._running:
            self._record_mismatch("reads the mode of another module")

    def _may_return_its_mode(self, path: str, result: Any) -> bool:
        """Return True if a module returns a number, and its mode, or that of a module inside it, decided something."""
        decided = any(user == path or user.startswith(f"{path}.") for user in self.mode_users)
        return decided and any(isinstance(value, int | float) for value in tree_leaves(result))

    def _record_mismatch(self, what: str) -> None:
        """Record what the innermost running forward does that a graph would not; the first such record counts."""
        self.mismatches.setdefault(self._running[-1] if self._running else "", f"its forward {what}")


def keep_former_values(graph: fx.Graph) -> None:
    """Let assignments in place leave the value under its former name, where that is used again.

    fx writes them as statements, ``a += b``, which give the name ``a`` another value where that cannot change in place,
    such as a number.
    """
    done: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        function = assignments.BY_OPERATOR.get(node.target) if node.op == "call_function" else None
        if (
            function is not None
            and isinstance(node.args[0], fx.Node)
            and any(user in done for user in node.args[0].users)
        ):
            node.target = function
        done.add(node)


def is_site_or_leaf(module: nn.Module) -> bool:
    """Return True for modules that no graph looks into: single layers, factorized layers, and torch.nn's own."""
    if isinstance(module, Factorized | torch.jit.ScriptModule):
        return True
    if type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
        # A list or a dictionary of modules computes nothing; other modules call what it holds.
        return False
    kind = find_kind(module)
    if kind is not None:
        return kind.is_intact(module)
    return not is_transformer_block(module) and bool(fx.Tracer().is_leaf_module(module, ""))


def _is_no_literal(value: Any) -> bool:
    """Return True for a number or text of a class of its own, such as NumPy's, and for a member of an enumeration."""
    return isinstance(value, (Enum, *_LITERALS)) and type(value) not in _LITERALS


def _has_own_call(kind: type[nn.Module]) -> bool:
    owner = next(base for base in kind.__mro__ if "__call__" in vars(base))
    return owner is not nn.Module and not issubclass(owner, fx.GraphModule)


def _execution_context() -> tuple[object, ...]:
    """Return the global state by which an operation runs and is kept for backward: gradients, autocast, checkpoints."""
    autocast = (torch.is_autocast_enabled(kind) for kind in AUTOCAST_KINDS)
    checkpoint = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, checkpoint

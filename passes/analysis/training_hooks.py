"""Hooks on a model in training that report each call of a site, with its input and its output, and change nothing."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdfx.factors.operation import Operation
from tdfx.kinds.attention import attend
from tdfx.kinds.parse_products import Views
from tdfx.kinds.products import ProductCall
from tdfx.layers.module_state import COMPILED
from tdfx.layers.parameter import FactorizedParameter
from tdfx.passes.analysis.guard import storage_address
from tdfx.passes.analysis.watched_weights import (
    WeightOwner,
    is_matrix,
    join,
    layer_weight,
    modules_by_path,
    operation_of_layer,
    wrapped,
    wrappers,
)

Arrange = Callable[[Tensor], Tensor]


class TrainingHooks:
    """Reports the forward passes of a model, and the calls of its sites whose outputs require gradients.

    While attached, the model runs eagerly where ``torch.compile`` has compiled it, because compiled code calls no hooks.
    Nothing is reported where the model is traced, exported or captured, or called by a function that is compiled itself.
    """

    operations: dict[str, Operation | None]
    """Path of a weight whose calls can be reported, without the names of wrappers -> what its layer computes, if known."""

    def __init__(
        self,
        model: nn.Module,
        on_forward: Callable[[tuple[Any, ...], dict[str, Any]], None],
        on_call: Callable[[str, Operation, Tensor, Tensor, Arrange], None],
    ) -> None:
        """Attach the hooks.

        Args:
            model: The model as the training loop calls it.
            on_forward: Called before each forward pass of the model, with its arguments.
            on_call: Called after each call of a site with the path of its weight, what it computes, its input and output,
                and a function that brings the channels of the output, or of its gradient, to where the operation has them.
        """
        self.operations = {}
        self._turns: dict[str, int] = {}
        self._on_forward, self._on_call = on_forward, on_call
        self._owners: list[WeightOwner] = []
        self._layers: set[int] = set()  # identities of the layers with a hook
        self._uncalled: set[str] = set()  # weights of those that have not been called yet
        self._owner_of: dict[int, WeightOwner] = {}  # by the identity of the weight
        self._views = Views()
        self._running: list[tuple[nn.Module, ExitStack]] = []
        self._undo = ExitStack()
        self._roots = [weakref.ref(root) for root in wrappers(model)]
        modules = list(modules_by_path(model))
        for path, module in modules:
            self._attach(path, module)
        self._has_functions = any(owner.by_function for owner in self._owners)
        # What takes part in functions, and what torch.compile has wrapped, may run outside of the model's forward.
        parts = [owner.module for owner in self._owners]
        parts += [module for _, module in modules if id(module) in self._layers or wrapped(module) is not None]
        for module in {id(module): module for module in (*wrappers(model), *parts)}.values():
            before, after = _Hook(self, module, "enter"), _Hook(self, module, "_leave")
            self._undo.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            self._undo.callback(module.register_forward_hook(after, always_call=True).remove)

    def turn_of(self, path: str) -> int:
        """Return the position of a weight among all."""
        if len(self._turns) != len(self.operations):
            self._turns = {weight: turn for turn, weight in enumerate(self.operations)}
        return self._turns.get(path, 0)

    @property
    def in_forward(self) -> bool:
        """True while a forward pass of the model runs."""
        return any(self._is_root(module) for module, _ in self._running)

    def remove(self) -> None:
        """Take the hooks off; does nothing the second time."""
        self._close()
        self._undo.close()
        self._owners, self._owner_of = [], {}

    def _attach(self, path: str, module: nn.Module) -> None:
        weight = layer_weight(path, module)
        if weight:
            self.operations[weight] = operation_of_layer(module)
            self._layers.add(id(module))
            self._uncalled.add(weight)
            hook = _Hook(self, module, "_report_layer", weight)
            # First, so that it sees the output of the layer and not what a hook of the user's makes of it.
            self._undo.callback(module.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
        for name, value in (*module._parameters.items(), *module._modules.items()):
            if isinstance(value, FactorizedParameter) or is_matrix(value):
                by_function = not weight and not isinstance(module, nn.Embedding | nn.EmbeddingBag)
                self._owners.append(WeightOwner(module, name, join(path, name), by_function))
                self.operations.setdefault(join(path, name), None)
        code = module.__dict__.get(COMPILED)
        if code is not None:
            self._run_eagerly(module, code)

    def _run_eagerly(self, module: nn.Module, code: Callable[..., Any]) -> None:
        """Run a module that is compiled in place without its compiled code, which includes the calls of its hooks."""
        hooks = weakref.ref(self)

        def call(*args: Any, **named: Any) -> Any:
            with nullcontext() if hooks() is None or torch.compiler.is_compiling() else _eager():
                return code(*args, **named)

        def restore() -> None:
            if module.__dict__.get(COMPILED) is call:
                module.__dict__[COMPILED] = code

        module.__dict__[COMPILED] = call
        self._undo.callback(restore)

    def enter(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Report that a forward pass begins, if it is that of the model; the hook of the module calls this."""
        is_root = self._is_root(module)
        if is_root and any(running is module or not self._is_root(running) for running, _ in self._running):
            self._close()  # an interrupt, which is no Exception, has ended a former pass without a call of the hook
        stack = ExitStack()
        if not self._running:
            if is_root:
                self._on_forward(args, named)
            stack.enter_context(_eager())
            # A layer that is not called may be one whose weight is passed to a function.
            if (self._has_functions or self._uncalled) and torch.is_grad_enabled():
                stack.enter_context(_FunctionWatch(self._report_function))
        self._running.append((module, stack))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1][0] is module:
            self._running.pop()[1].close()

    def _is_root(self, module: nn.Module) -> bool:
        return any(root() is module for root in self._roots)

    def _close(self) -> None:
        while self._running:
            self._running.pop()[1].close()

    def _report_layer(
        self, layer: nn.Module, path: str, args: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> None:
        self._uncalled.discard(path)
        x = next((value for value in (*args, *named.values()) if isinstance(value, Tensor)), None)
        self._report(path, operation_of_layer(layer), x, output)

    def _report_function(self, function: object, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        if self._running and id(self._running[-1][0]) in self._layers:
            return  # the layer reports itself
        if self._views.record(function, args, named, output):
            return
        call = self._views.call(function, args, named)
        if call is not None and isinstance(call.weight, nn.Parameter | FactorizedParameter):
            path = self._path_of(call.weight)
            operation = call.operation(call.weight.shape) if path else None
            if not isinstance(call, ProductCall):
                self._report(path, operation, call.rest.get("input"), output)
            elif operation is not None and (arrange := call.arrange()) is not None:
                self._report_product(path, operation, call.rest["input"], output, arrange)

    def _report(self, path: str, operation: Operation | None, x: object, output: object) -> None:
        if operation is None or not _is_plain(x) or not _is_plain(output) or not output.requires_grad:
            return
        dim, channels = -1 - operation.dims, (operation.in_channels, operation.out_channels)
        if min(x.dim(), output.dim()) >= -dim and (x.shape[dim], output.shape[dim]) == channels:
            self._on_call(path, operation, x, output, _as_it_is)

    def _report_product(
        self, path: str, operation: Operation, x: object, output: object, arrange: tuple[Arrange, Arrange]
    ) -> None:
        """Report a product with its channels brought to the last dimension, for the input here, for gradients later."""
        if _is_plain(x) and _is_plain(output) and output.requires_grad:
            with torch.no_grad():
                rows = arrange[0](x)
            self._on_call(path, operation, rows, output, arrange[1])

    def _path_of(self, weight: nn.Parameter | FactorizedParameter) -> str:
        """Return the path of a weight by its first owner, or "" for a weight of another model.

        The weights are looked up anew when one is not known: FSDP2 replaces them while a module runs.
        """
        owner = self._owner_of.get(id(weight))
        if owner is None or owner.weight is not weight:
            self._owner_of = {id(owner.weight): owner for owner in reversed(self._owners)}
            owner = self._owner_of.get(id(weight))
        return "" if owner is None else owner.path


class _Hook:
    """A hook of one module, which does nothing on any copy of the module, nor after the object that it calls is gone."""

    __slots__ = ("arguments", "method", "module", "owner")

    def __init__(
        self, owner: object = None, module: nn.Module | None = None, method: str = "", *arguments: Any
    ) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.module = None if module is None else weakref.ref(module)
        self.method, self.arguments = method, arguments

    def __call__(self, module: nn.Module, *values: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._is_tracing() or _is_capturing():
            return
        owner = None if self.owner is None else self.owner()
        if owner is not None and self.module is not None and self.module() is module:
            getattr(owner, self.method)(module, *self.arguments, *values)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _FunctionWatch(TorchFunctionMode):
    """Calls ``report`` after every call of a torch function, with its arguments and its result."""

    def __init__(self, report: Callable[[object, tuple[Any, ...], Mapping[str, Any], Any], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            with self:
                return attend(*args, **named)
        result = func(*args, **named)
        self.report(func, args, named, result)
        return result


def _eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled code runs eagerly; one that does nothing where nothing can be compiled."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    try:
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    except RuntimeError:  # a compiled function calls the model, in a part that could not be compiled
        return nullcontext()
    return stance


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Return True for a dense tensor of floating-point numbers that holds its values itself."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and not value.is_nested
        and storage_address(value) != 0
    )


def _is_capturing() -> bool:
    """Return True while a CUDA graph is captured, which would repeat what a hook computes."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]

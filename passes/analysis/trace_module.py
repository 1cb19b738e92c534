"""Tracing one module in train and in eval mode, with the blocks inside it that no graph can stand for as single calls."""

from __future__ import annotations

import traceback
from collections.abc import Collection
from pathlib import Path

import torch
from torch import fx, nn

from tdfx.errors import ModelError
from tdfx.passes.analysis.fidelity import ForwardMonitor, mismatch_of_block, mismatch_of_root
from tdfx.passes.analysis.guard import (
    CustomFunctionError,
    ParameterGuard,
    WritesParameterError,
    refuse_custom_function,
    watch_custom_functions,
)
from tdfx.passes.analysis.modes import unify
from tdfx.passes.analysis.sandbox import isolated, remove_hooks, scratch_copy
from tdfx.passes.analysis.tracer import SiteTracer, is_site_or_leaf
from tdfx.passes.program import Traced

_TRACING_CODE = {Path(torch.__file__).parent, Path(__file__).parent}
"""Folders whose lines in a traceback are not the user's."""


class ModuleTracer:
    """Traces modules one after the other, and remembers which classes of blocks a graph has to call as they are.

    Args:
        compiled: The modules, by identity, that are compiled by themselves.
    """

    def __init__(self, compiled: Collection[int] = ()) -> None:
        self.compiled = compiled
        self.opaque_classes: dict[type[nn.Module], str] = {}
        """Class of a block -> why graphs call its modules as they are."""

    def trace(self, module: nn.Module) -> Traced:
        """Trace a module in both modes; the result has no graph where torch.fx cannot follow the module's own code.

        A trace shows at most one block that has to be opaque, so it is repeated until it shows none.
        """
        opaque_paths = self._opaque_from_the_start(module)
        while True:
            train, evaluation = (
                _ModeTrace(module, training, self.opaque_classes, opaque_paths) for training in (True, False)
            )
            block = train.opaque_block() or evaluation.opaque_block() or _block_with_two_forwards(train, evaluation)
            if block is None or not self._make_opaque(module, *block, opaque_paths):
                return self._result(module, train, evaluation, opaque_paths)

    def _opaque_from_the_start(self, module: nn.Module) -> dict[str, str]:
        """Return the blocks whose own code or hooks show that a graph must call them as they are: path -> why."""
        blocks = {path: block for path, block in module.named_modules() if path and not is_site_or_leaf(block)}
        opaque = {path: why for path, block in blocks.items() if (why := mismatch_of_block(block))}
        # A graph that looked into a compiled block would never run the compiled code.
        compiled = {path: "it is compiled by itself" for path, block in blocks.items() if id(block) in self.compiled}
        return opaque | compiled

    def _make_opaque(self, module: nn.Module, path: str, why: str, opaque_paths: dict[str, str]) -> bool:
        """Make a block opaque, with all others of its class; return False if it cannot be, or is already."""
        block = module.get_submodule(path)
        if is_site_or_leaf(block) or type(block) in self.opaque_classes or path in opaque_paths:
            return False
        if type(block).__module__.startswith("torch.nn"):  # two Sequentials have little in common
            opaque_paths[path] = why
        else:
            self.opaque_classes[type(block)] = why
        return True

    def _result(
        self, module: nn.Module, train: _ModeTrace, evaluation: _ModeTrace, opaque_paths: dict[str, str]
    ) -> Traced:
        if train.graph is None or evaluation.graph is None:
            return Traced((), train.error if train.graph is None else evaluation.error)
        called = train.tracer.opaque_modules | evaluation.tracer.opaque_modules
        opaque = {path: opaque_paths.get(path) or self.opaque_classes[type(block)] for path, block in called.items()}
        mismatch = next(iter([*train.mismatches.values(), *evaluation.mismatches.values()]), "")
        mismatch = mismatch or mismatch_of_root(module)
        mismatch = mismatch or _bypass(train.graph, called) or _bypass(evaluation.graph, called)
        if graph := _graph_for_both_modes(train, evaluation):
            return Traced((graph,), mismatch, opaque)
        if train.mode_users | evaluation.mode_users != {""}:
            mismatch = mismatch or "its forward differs between train and eval mode"
        return Traced((train.graph, evaluation.graph), mismatch, opaque)


class _ModeTrace:
    def __init__(
        self,
        module: nn.Module,
        training: bool,
        opaque_classes: Collection[type[nn.Module]],
        opaque_paths: Collection[str],
    ) -> None:
        self.tracer = SiteTracer(opaque_classes, opaque_paths)
        self.graph: fx.Graph | None = None
        self.error = ""
        """Why there is no graph."""
        scratch = scratch_copy(module, training=training)
        remove_hooks(scratch)
        monitor = ForwardMonitor(scratch)
        mismatches: dict[str, str] = {}
        try:
            with isolated(scratch), ParameterGuard(module), watch_custom_functions(refuse_custom_function):
                self.graph = self.tracer.trace_in_mode(scratch, training)
                if monitor.drew_random_numbers() and not self.tracer.mismatches:
                    mismatches[""] = "its forward draws random numbers that a graph would freeze"
        except Exception as error:  # a user's forward may raise any class when it meets a Proxy
            _refuse_hidden_layers(module, error)
            refused = isinstance(error, WritesParameterError | CustomFunctionError)
            self.error = str(error) if refused else _describe_error(error)
        self.mismatches = {**monitor.mismatches(), **mismatches, **self.tracer.mismatches}
        """Path of a module -> what its forward did that a graph would not do again."""

    @property
    def mode_users(self) -> set[str]:
        """Paths of the modules whose own mode decided something."""
        return self.tracer.mode_users

    def opaque_block(self) -> tuple[str, str] | None:
        """Return the path of a block that a graph should call as it is, and why; None if the trace shows no such block."""
        if self.graph is None:
            return (self.tracer.failed_at, self.error) if self.tracer.failed_at else None
        return next(((path, why) for path, why in self.mismatches.items() if path), None)


def _block_with_two_forwards(train: _ModeTrace, evaluation: _ModeTrace) -> tuple[str, str] | None:
    """Return a block whose own mode decides more than constants, and why to call it as it is.

    The graphs for train and eval mode are chosen by the mode of the root, and such a block must follow its own.
    """
    if train.graph is None or evaluation.graph is None or _graph_for_both_modes(train, evaluation) is not None:
        return None
    inner = sorted((train.mode_users | evaluation.mode_users) - {""})
    return (inner[0], "its forward differs between train and eval mode") if inner else None


def _graph_for_both_modes(train: _ModeTrace, evaluation: _ModeTrace) -> fx.Graph | None:
    assert train.graph is not None
    assert evaluation.graph is not None
    if _code(train.graph) == _code(evaluation.graph):
        return train.graph
    return unify(train.graph, evaluation.graph, train.mode_users | evaluation.mode_users)


def _code(graph: fx.Graph) -> str:
    return str(graph.python_code("self").src)


def _bypass(graph: fx.Graph, opaque: dict[str, nn.Module]) -> str:
    """Return a mismatch if the graph calls a layer inside an opaque block, past the block's own forward."""
    for node in graph.nodes:
        for path, block in opaque.items():
            if node.op == "call_module" and str(node.target).startswith(f"{path}."):
                return f"its forward calls {node.target!r} past the {type(block).__name__} that holds it"
    return ""


def _refuse_hidden_layers(module: nn.Module, error: Exception) -> None:
    """Raise ModelError where forward calls a layer through an object that was shared, not copied."""
    if isinstance(error, NameError) and "not installed as a submodule" in str(error):
        raise ModelError(
            f"{type(module).__name__} calls a layer that it reaches through an object of its own, not as a submodule, so it "
            f"would go on calling the old layer after a rewrite. Hold the layer as an attribute of a module."
        ) from error


def _describe_error(error: Exception) -> str:
    """Return what stopped a trace, with the line of the user's code if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [frame for frame in frames if _TRACING_CODE.isdisjoint(Path(frame.filename).parents)]
    line = "".join(f" at {Path(frame.filename).name}:{frame.lineno} ({frame.line})" for frame in user_frames[-1:])
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"torch.fx cannot follow its forward{line}: {type(error).__name__}: {message}"

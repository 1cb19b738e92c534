"""nn.Module -> graphs: of the whole model where a graph is faithful, and of its parts where it is not."""

from __future__ import annotations

import inspect
import traceback
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import fx, nn

from tdfx.errors import ModelError
from tdfx.kinds.registry import is_candidate
from tdfx.layers.copying import structural_copy
from tdfx.layers.factorized import Factorized
from tdfx.layers.module_state import COMPILED, HOOKS, MODULE_STATE
from tdfx.layers.paths import parameters_by_path
from tdfx.passes.analysis.code_reader import CodeReader, UnsafeCodeError, refuse_wrapped_forward
from tdfx.passes.analysis.fidelity import ForwardMonitor, mismatch_of_block, mismatch_of_root
from tdfx.passes.analysis.guard import (
    CustomFunctionError,
    ParameterGuard,
    WritesParameterError,
    refuse_custom_function,
    watch_custom_functions,
)
from tdfx.passes.analysis.modes import unify
from tdfx.passes.analysis.safe_code import ANY_ATTRIBUTE
from tdfx.passes.analysis.sandbox import isolated, remove_hooks, scratch_copy
from tdfx.passes.analysis.saved_values import is_plain
from tdfx.passes.analysis.stores import stored_by_block, stored_by_hooks
from tdfx.passes.analysis.tracer import HiddenLayerError, SiteTracer, is_site_or_leaf
from tdfx.passes.analysis.uncopied import refuse_iterators_of_modules, warn_of_finalizers
from tdfx.passes.analysis.user_state import UserState
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import Program, Reads, Traced

_TRACING_CODE = {Path(torch.__file__).parent, Path(__file__).parent}
"""Folders whose lines in a traceback are not the user's."""


class Trace(Pass[PassResult]):
    """Make a structural copy of the model and record the graphs of as much of it as torch.fx can follow."""

    name = "trace"

    def run(self, program: Program) -> PassResult:
        """Trace the root and, where that fails, its children, down to single layers."""
        warn_of_finalizers(program.module)
        state = UserState(program.module)
        refuse_iterators_of_modules(program.module, state.iterators)
        if state.iterators:
            state.wrap_iterators()
            state = UserState(program.module)
        module = structural_copy(program.module)
        tracer = ModuleTracer(_compiled_modules(program.module, module), state)
        traces = dict(_trace_tree(module, "", tracer))
        graphs = {path: traced for path, traced in traces.items() if traced.graphs}
        root = traces.get("") or Traced((), _why_not_looked_into(module))
        emit, notes = program.emit, program.notes
        if emit == "graph" and root.mismatch:
            emit = "modules"
            notes += (f"given back as {type(module).__name__}, not as a graph: {root.mismatch}",)
        elif emit == "graph":
            counts = Counter((type(module.get_submodule(path)).__name__, why) for path, why in root.opaque.items())
            notes += tuple(f"the graph calls {count} {name} as it is: {why}" for (name, why), count in counts.items())
        changes = tuple(Change(path, "traced") for path in graphs)
        return PassResult(replace(program, module=module, graphs=graphs, emit=emit, notes=notes), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """The copy holds the model's own tensors under the model's own names, and nothing that a trace left behind."""
        same = _tensors(before.module) == _tensors(result.program.module)
        self.check(same, "the copy has the model's parameters and buffers, no more and no fewer")


def _compiled_modules(model: nn.Module, copy: nn.Module) -> frozenset[int]:
    """Return the modules of a copy, by identity, whose originals are compiled by themselves."""
    pairs = zip(model.modules(), copy.modules(), strict=True)
    return frozenset(id(copied) for original, copied in pairs if original.__dict__.get(COMPILED) is not None)


def _trace_tree(module: nn.Module, path: str, tracer: ModuleTracer) -> Iterator[tuple[str, Traced]]:
    """Yield what tracing gives for a module, and then for those inside it that no graph of it shows, by path."""
    if is_site_or_leaf(module):
        return
    traced = Traced(())
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        traced = tracer.trace(module)
    yield path, traced
    unseen = traced.opaque if traced.graphs else [name for name, _ in module.named_children()]
    for name in unseen:
        yield from _trace_tree(module.get_submodule(name), f"{path}.{name}" if path else name, tracer)


def _why_not_looked_into(module: nn.Module) -> str:
    if is_candidate(module) or isinstance(module, Factorized):
        return "the model is itself one layer"
    return f"torch.fx does not look inside {type(module).__name__}, which torch.nn runs as a whole"


def _tensors(module: nn.Module) -> list[tuple[str, int]]:
    named = [*parameters_by_path(module, remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor)) for name, tensor in named]


class ModuleTracer:
    """Traces modules one after the other, and remembers which classes of blocks a graph has to call as they are."""

    def __init__(self, compiled: Collection[int] = (), state: UserState | None = None) -> None:
        self.compiled = compiled
        """The modules, by identity, that are compiled by themselves."""
        self.state = state
        """What the code of all modules can change, if it was saved."""
        self.opaque_classes: dict[type[nn.Module], str] = {}
        """Class of a block -> why graphs call its modules as they are."""

    def trace(self, module: nn.Module) -> Traced:
        """Trace a module in both modes; the result has no graph where torch.fx cannot follow the module's own code.

        A trace shows at most one block that has to be opaque, so it is repeated until it shows none.
        """
        opaque_paths = self._opaque_from_the_start(module)
        stored = _Stored(module)
        while True:
            tracers = [SiteTracer(self.opaque_classes, opaque_paths) for _ in range(2)]
            train, evaluation = (
                _ModeTrace(module, mode, tracers[not mode], stored, self.state) for mode in (True, False)
            )
            block = train.opaque_block() or evaluation.opaque_block() or _block_with_two_forwards(train, evaluation)
            block = block or train.reader_of_stored() or evaluation.reader_of_stored()
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
        if reader := train.reader_of_stored() or evaluation.reader_of_stored():
            return Traced((), reader[1])
        called = train.tracer.opaque_modules | evaluation.tracer.opaque_modules
        opaque = {path: opaque_paths.get(path) or self.opaque_classes[type(block)] for path, block in called.items()}
        mismatch = next(iter([*train.mismatches.values(), *evaluation.mismatches.values()]), "")
        mismatch = mismatch or mismatch_of_root(module)
        mismatch = mismatch or _bypass(train.graph, called) or _bypass(evaluation.graph, called)
        reads = _reads_of(train, evaluation)
        if graph := _graph_for_both_modes(train, evaluation):
            return Traced((graph,), mismatch, opaque, reads)
        if train.mode_users | evaluation.mode_users != {""}:
            mismatch = mismatch or "its forward differs between train and eval mode"
        return Traced((train.graph, evaluation.graph), mismatch, opaque, reads)


class _Stored:
    """The names of what code beside the graphs of a module may change, each with who changes it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.by_blocks: dict[str, frozenset[str]] = {}

    @cached_property
    def by_hooks(self) -> frozenset[str]:
        """What hooks change, and a user's own ``train``."""
        return stored_by_hooks(self.module)

    def names(self, opaque_paths: Iterable[str]) -> dict[str, str]:
        """Return each name and who changes what it names, where the graphs call these blocks as they are."""
        changed = dict.fromkeys(self.by_hooks, "a hook or train()")
        for path in opaque_paths:
            block = self.module.get_submodule(path)
            if path not in self.by_blocks:
                self.by_blocks[path] = stored_by_block(block)
            changed |= dict.fromkeys(self.by_blocks[path], f"a {type(block).__name__} inside it")
        aliases = [(name, names) for names in self.aliases for name in names & changed.keys()]
        return {alias: changed[name] for name, names in aliases for alias in names} | changed

    @cached_property
    def aliases(self) -> list[set[str]]:
        """The names of each object that attributes and hooks of the module know under several."""
        names: defaultdict[int, set[str]] = defaultdict(set)
        for module in self.module.modules():
            for name, value in vars(module).items():
                if name not in MODULE_STATE and not is_plain(value):
                    names[id(value)].add(name)
        for module in self.module.modules():
            for hook in (each for name in HOOKS for each in vars(module)[name].values()):
                for name, value in inspect.getclosurevars(hook).nonlocals.items() if inspect.isfunction(hook) else ():
                    names[id(value)].add(name)
        return [each for each in names.values() if len(each) > 1]


class _ModeTrace:
    def __init__(
        self, module: nn.Module, training: bool, tracer: SiteTracer, stored: _Stored, state: UserState | None
    ) -> None:
        self.tracer = tracer
        self.stored = stored
        self.mode_users = tracer.mode_users
        self.graph: fx.Graph | None = None
        self.error = ""
        """Why there is no graph."""
        scratch = scratch_copy(module, training=training)
        remove_hooks(scratch)
        self.reader = CodeReader(lambda: tracer.running)
        mismatches: dict[str, str] = {}
        try:
            with isolated(scratch, traces=True, base=state) as saved:
                monitor = ForwardMonitor(scratch)
                with ParameterGuard(module), watch_custom_functions(refuse_custom_function), self.reader.watch():
                    refuse_wrapped_forward(scratch)
                    self.graph = self.tracer.trace_in_mode(scratch, training)
                compile(self.graph.python_code("self").src, "<graph>", "exec")  # a path or a key may be no code
                if self.reader.refusal:  # the forward has caught the error
                    raise UnsafeCodeError(self.reader.refusal)
                mismatches = monitor.mismatches()
                if not mismatches and (where := saved.changed()) is not None:
                    mismatches[""] = f"its forward changes {where or 'what it holds'}"
                if monitor.drew_random_numbers() and not self.tracer.mismatches:
                    mismatches.setdefault("", "its forward draws random numbers that a graph would freeze")
        except Exception as error:  # a user's forward may raise any class when it meets a Proxy
            _refuse_hidden_layers(module, error)
            refused = isinstance(error, WritesParameterError | CustomFunctionError | UnsafeCodeError)
            self.graph, self.error = None, str(error) if refused else _describe_error(error)
        self.mismatches = {**mismatches, **self.tracer.mismatches}
        """Path of a module -> what its forward did that a graph would not do again."""

    def opaque_block(self) -> tuple[str, str] | None:
        """Return the path of a block that a graph should call as it is, and why; None if the trace shows no such block."""
        if self.graph is None:
            return (self.tracer.failed_at, self.error) if self.tracer.failed_at else None
        return next(((path, why) for path, why in self.mismatches.items() if path), None)

    def reader_of_stored(self) -> tuple[str, str] | None:
        """Return the path of a module that reads what code beside the graph may change, and what that is."""
        if self.graph is None:
            return None
        stored = self.stored.names(self.tracer.opaque_modules)
        for path, names in self.reader.attributes.items():
            by_name = vars(self.stored.module.get_submodule(path)).keys() if ANY_ATTRIBUTE in names else ()
            if name := min(names.union(by_name) & stored.keys(), default=""):
                return path, f"its forward reads {name!r}, which {stored[name]} may change"
        return None


def _block_with_two_forwards(train: _ModeTrace, evaluation: _ModeTrace) -> tuple[str, str] | None:
    """Return a block whose own mode decides more than constants, and why to call it as it is.

    The graphs for train and eval mode are chosen by the mode of the root, and such a block must follow its own.
    """
    if not train.graph or not evaluation.graph or _graph_for_both_modes(train, evaluation):
        return None
    inner = sorted((train.mode_users | evaluation.mode_users) - {""})
    return (inner[0], "its forward differs between train and eval mode") if inner else None


def _reads_of(*traces: _ModeTrace) -> Reads:
    """Return what the code of some traces reads; a helper may read what any module holds, so names have no path."""
    names = frozenset[str]().union(*(each for trace in traces for each in trace.reader.attributes.values()))
    files = {file for trace in traces for file in trace.reader.files}
    by_file = {file: frozenset[str]().union(*(trace.reader.files[file] for trace in traces)) for file in files}
    return Reads(names, frozenset().union(*(trace.tracer.entered for trace in traces)), by_file)


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
    if isinstance(error, HiddenLayerError):
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

"""nn.Module -> graph, for the whole model where that is faithful, and for its parts where it is not."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from tdfx.errors import ModelError
from tdfx.kinds.registry import is_candidate
from tdfx.layers.copying import COMPILED, structural_copy
from tdfx.layers.factorized import Factorized
from tdfx.passes.analysis.fidelity import ForwardMonitor, mismatch_of_block, mismatch_of_root
from tdfx.passes.analysis.guard import (
    CustomFunctionError,
    ParameterGuard,
    WritesParameterError,
    custom_functions,
    refuse_custom_function,
)
from tdfx.passes.analysis.modes import unify
from tdfx.passes.analysis.sandbox import isolated
from tdfx.passes.analysis.tracer import SiteTracer, is_site_or_leaf, scratch_copy, without_hooks
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import Program, Traced

_TORCH = Path(torch.__file__).parent
_REFUSALS = (WritesParameterError, CustomFunctionError)


class Trace(Pass[PassResult]):
    """Make a structural copy of the model and record the graphs of as much of it as torch.fx can follow."""

    name = "trace"

    def run(self, program: Program) -> PassResult:
        """Trace the root, and where that fails its children, down to single layers."""
        module = structural_copy(program.module)
        whole: dict[type[nn.Module], str] = {}
        attempts = dict(_attempts(module, "", whole, _compiled(program.module, module)))
        graphs = {
            path: Traced(attempt.graphs, attempt.mismatch, frozenset(attempt.blocks))
            for path, attempt in attempts.items()
            if attempt.graphs
        }
        root = attempts.get("", Attempt(mismatch=_one_layer(module)))
        emit = program.emit
        notes = program.notes
        if root.mismatch and emit == "graph":
            emit = "modules"
            notes = (*notes, f"given back as {type(module).__name__}, not as a graph: {root.mismatch}")
        elif emit == "graph":
            notes = (*notes, *_notes_of_blocks(module, root))
        traced = replace(program, module=module, graphs=graphs, emit=emit, notes=notes)
        return PassResult(traced, tuple(Change(path, "traced") for path in graphs))

    def ensures(self, before: Program, result: PassResult) -> None:
        """The copy holds the model's own tensors under the model's own names, and nothing that a trace left behind."""
        self.check(
            _tensors(before.module) == _tensors(result.program.module),
            "the copy has the model's parameters and buffers, no more and no fewer",
        )


@dataclass(slots=True)
class Attempt:
    """One try at tracing one module."""

    graphs: tuple[fx.Graph, ...] = ()
    """One graph, two where train and eval mode differ in more than constants, none where tracing failed."""
    mismatch: str = ""
    """Why the graph may not do what the module does; "" if it does."""
    blocks: dict[str, str] = field(default_factory=dict)
    """Path of a module inside it that the graph calls as it is -> why."""


def attempt_trace(module: nn.Module, whole: dict[type[nn.Module], str], compiled: Collection[int] = ()) -> Attempt:
    """Trace a module in both modes, and keep those of its blocks whole for which the graph could not stand.

    Args:
        module: It is left as it was.
        whole: Class -> why modules of this class are kept whole; what is learned is added.
        compiled: The modules, by identity, that are compiled by themselves.
    """
    blocks = {path: why for path, one in _blocks(module) if (why := mismatch_of_block(one))}
    # A graph that computed what is in them would leave their code uncalled.
    blocks |= {path: "it is compiled by itself" for path, one in _blocks(module) if id(one) in compiled}
    while True:
        once = [_Run(module, training, whole, blocks) for training in (True, False)]
        lesson = next(filter(None, (run.lesson() for run in once)), None) or _lesson_of_modes(*once)
        if lesson is None or not _learn(module, lesson, whole, blocks):
            return _concluded(module, once, whole, blocks)


class _Run:
    """One trace of one module in one mode."""

    def __init__(
        self, module: nn.Module, training: bool, whole: dict[type[nn.Module], str], blocks: dict[str, str]
    ) -> None:
        self.tracer = SiteTracer(whole, blocks)
        self.graph: fx.Graph | None = None
        self.error = ""
        self.mismatches: dict[str, str] = {}
        copy = without_hooks(scratch_copy(module, training))
        watch = ForwardMonitor(copy)
        try:
            with (
                isolated(copy),
                ParameterGuard(module),
                custom_functions(refuse_custom_function),
            ):
                self.graph = self.tracer.trace_in_mode(copy, training)
                if watch.drew() and not self.tracer.mismatches:
                    self.mismatches[""] = "its forward draws random numbers that a graph would freeze"
        except Exception as error:  # what a user's forward raises when it meets a Proxy can be of any class
            _refuse_hidden_layers(module, error)
            self.error = str(error) if isinstance(error, _REFUSALS) else _why_not(error)
        self.mismatches = {**watch.mismatches(), **self.mismatches, **self.tracer.mismatches}

    @property
    def deciders(self) -> set[str]:
        return self.tracer.deciders

    def lesson(self) -> tuple[str, str] | None:
        """Return the path of a block to keep whole the next time, and why; None if nothing inside went wrong."""
        if self.graph is None:
            return (self.tracer.failed_at, self.error) if self.tracer.failed_at else None
        inner = [path for path in self.mismatches if path]
        return (inner[0], self.mismatches[inner[0]]) if inner else None


def _lesson_of_modes(train: _Run, evaluation: _Run) -> tuple[str, str] | None:
    """Return a block whose own mode decides more than constants: it must follow that mode, not the root's."""
    if train.graph is None or evaluation.graph is None or _one_graph(train, evaluation) is not None:
        return None
    inner = sorted((train.deciders | evaluation.deciders) - {""})
    return (inner[0], "its forward is another one in train than in eval mode") if inner else None


def _one_graph(train: _Run, evaluation: _Run) -> fx.Graph | None:
    """Return one graph for both modes, or None where they differ in more than constants."""
    assert train.graph is not None
    assert evaluation.graph is not None
    if _code(train.graph) == _code(evaluation.graph):
        return train.graph
    return unify(train.graph, evaluation.graph, train.deciders | evaluation.deciders)


def _learn(
    module: nn.Module, lesson: tuple[str, str], whole: dict[type[nn.Module], str], blocks: dict[str, str]
) -> bool:
    """Note a block to be kept whole, with all of its class; return False if that is no news."""
    path, why = lesson
    block = module.get_submodule(path)
    if is_site_or_leaf(block) or type(block) in whole or path in blocks:
        return False
    if type(block).__module__.startswith("torch.nn"):  # a Sequential is one of many that differ
        blocks[path] = why
    else:
        whole[type(block)] = why
    return True


def _concluded(
    module: nn.Module, once: list[_Run], whole: dict[type[nn.Module], str], blocks: dict[str, str]
) -> Attempt:
    train, evaluation = once
    kept = {path: one for run in once for path, one in run.tracer.kept_whole.items()}
    why = {path: blocks.get(path) or whole[type(one)] for path, one in kept.items()}
    if train.graph is None or evaluation.graph is None:
        return Attempt(mismatch=next(run.error for run in once if run.graph is None))
    graph = _one_graph(train, evaluation)
    mismatches = [run.mismatches[path] for run in once for path in run.mismatches]
    mismatch = next(iter(mismatches), "") or mismatch_of_root(module) or _way_around(once, kept)
    if graph is not None:
        return Attempt((graph,), mismatch, why)
    if train.deciders | evaluation.deciders != {""}:
        mismatch = mismatch or "its forward is not the same in train and in eval mode"
    return Attempt((train.graph, evaluation.graph), mismatch, why)


def _way_around(once: list[_Run], kept: dict[str, nn.Module]) -> str:
    """Return a doubt where the graph calls a layer inside a block that it ought to call as a whole."""
    for run in once:
        assert run.graph is not None
        for node in run.graph.nodes:
            for path in kept:
                if node.op == "call_module" and str(node.target).startswith(f"{path}."):
                    return f"its forward calls {node.target!r} past the {type(kept[path]).__name__} that holds it"
    return ""


def _compiled(model: nn.Module, copy: nn.Module) -> frozenset[int]:
    """Return the modules of a copy, by identity, that are compiled by themselves in the model."""
    both = zip(model.modules(), copy.modules(), strict=True)
    return frozenset(id(twin) for one, twin in both if one.__dict__.get(COMPILED) is not None)


def _blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules inside one that a graph would look into."""
    return [(path, one) for path, one in module.named_modules() if path and not is_site_or_leaf(one)]


def _attempts(
    module: nn.Module, path: str, whole: dict[type[nn.Module], str], compiled: Collection[int]
) -> list[tuple[str, Attempt]]:
    """Return the attempt at a module, and those at what its graph does not show."""
    if is_site_or_leaf(module):
        return []
    attempt = Attempt()
    below = [name for name, _ in module.named_children()]
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        attempt = attempt_trace(module, whole, compiled)
        if attempt.graphs:
            below = list(attempt.blocks)
    inner = [
        found
        for name in below
        for found in _attempts(module.get_submodule(name), f"{path}.{name}" if path else name, whole, compiled)
    ]
    return [(path, attempt), *inner]


def _notes_of_blocks(module: nn.Module, root: Attempt) -> list[str]:
    """Say once for each class what the graph calls as it is."""
    kinds = Counter((type(module.get_submodule(path)).__name__, why) for path, why in root.blocks.items())
    return [f"the graph calls {count} {name} as it is: {why}" for (name, why), count in kinds.items()]


def _refuse_hidden_layers(module: nn.Module, error: Exception) -> None:
    """Raise ModelError where forward calls a layer through an object that was shared, not copied."""
    if isinstance(error, NameError) and "not installed as a submodule" in str(error):
        raise ModelError(
            f"{type(module).__name__} calls a layer that it reaches through an object of its own, not as a submodule, so it "
            f"would go on calling the old layer after a rewrite. Hold the layer as an attribute of a module."
        ) from error


def _one_layer(module: nn.Module) -> str:
    if is_candidate(module) or isinstance(module, Factorized):
        return "the model is itself one layer"
    return f"torch.fx does not look inside {type(module).__name__}, which torch.nn runs as a whole"


def _code(graph: fx.Graph) -> str:
    return str(graph.python_code("self").src)


def _tensors(module: nn.Module) -> list[tuple[str, int]]:
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return [(name, id(tensor)) for name, tensor in named]


def _why_not(error: Exception) -> str:
    """Return what stopped a trace and, where it can be told, the line of the model that did."""
    frames: list[Any] = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    message = str(error).strip().splitlines()
    return (
        f"torch.fx cannot follow its forward{where}: {type(error).__name__}: {message[0] if message else 'no message'}"
    )


def _is_users(filename: str) -> bool:
    path = Path(filename)
    return path != Path(__file__) and _TORCH not in path.parents and path.name not in {"structure.py", "tracer.py"}

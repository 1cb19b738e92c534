"""nn.Module -> graph, for the whole model where that is faithful, and for its parts where it is not."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from tdfx.errors import ModelError
from tdfx.kinds import is_candidate
from tdfx.layers import Factorized
from tdfx.passes.base import Change, Pass, PassResult, Program
from tdfx.passes.faithful import Watch, static_doubt
from tdfx.passes.tracer import SiteTracer, is_site_or_leaf, throwaway, without_hooks
from tdfx.structure import structural_copy

_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at tracing one module."""

    graphs: tuple[fx.Graph, ...] = ()
    """One graph, two where train and eval mode differ, none where tracing failed."""
    doubt: str = ""
    """Why the graph may not do what the module does; "" if it does."""


class Trace(Pass):
    """Make a structural copy of the model and record the graphs of as much of it as torch.fx can follow."""

    name = "trace"

    def run(self, program: Program) -> PassResult:
        """Trace the root, and where that fails its children, down to single layers."""
        module = structural_copy(program.module)
        attempts = dict(_attempts(module, ""))
        graphs = {path: attempt.graphs for path, attempt in attempts.items() if attempt.graphs}
        root = attempts.get("", Attempt(doubt=_one_layer(module)))
        notes = program.notes
        emit = program.emit
        if root.doubt and emit == "graph":
            emit = "modules"
            notes = (*notes, f"given back as {type(module).__name__}, not as a graph: {root.doubt}")
        traced = replace(program, module=module, graphs=graphs, emit=emit, notes=notes)
        return PassResult(traced, tuple(Change(path, "traced") for path in graphs))

    def ensures(self, before: Program, result: PassResult) -> None:
        """The copy holds the model's own tensors under the model's own names, and nothing that a trace left behind."""
        self.check(
            _tensors(before.module) == _tensors(result.program.module),
            "the copy has the model's parameters and buffers, no more and no fewer",
        )


def attempt_trace(module: nn.Module) -> Attempt:
    """Trace a module in both modes and say whether the graph can stand for it."""
    graphs: list[fx.Graph] = []
    doubts: list[str] = []
    for mode in (True, False):
        copy = without_hooks(throwaway(module, mode))
        watch = Watch(copy)
        try:
            with torch.random.fork_rng(devices=[]):
                graphs.append(SiteTracer().trace(copy))
                doubts.append(watch.doubt())
        except Exception as error:  # what a user's forward raises when it meets a Proxy can be of any class
            _refuse_hidden_layers(module, error)
            return Attempt(doubt=_why_not(error))
    if _code(graphs[0]) != _code(graphs[1]):
        return Attempt(tuple(graphs), "its forward is not the same in train and in eval mode")
    return Attempt((graphs[0],), next(filter(None, doubts), "") or static_doubt(module))


def _refuse_hidden_layers(module: nn.Module, error: Exception) -> None:
    """Raise ModelError where forward calls a layer through an object that was shared, not copied."""
    if isinstance(error, NameError) and "not installed as a submodule" in str(error):
        raise ModelError(
            f"{type(module).__name__} calls a layer that it reaches through an object of its own, not as a submodule, so it "
            f"would go on calling the old layer after a rewrite. Hold the layer as an attribute of a module."
        ) from error


def _attempts(module: nn.Module, path: str) -> list[tuple[str, Attempt]]:
    """Return the attempt at a module, and where it failed those at its children."""
    if is_site_or_leaf(module):
        return []
    attempt = Attempt()
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        attempt = attempt_trace(module)
        if attempt.graphs:
            return [(path, attempt)]
    below = [
        found
        for name, child in module.named_children()
        for found in _attempts(child, f"{path}.{name}" if path else name)
    ]
    return [(path, attempt), *below]


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
    return path != Path(__file__) and _TORCH not in path.parents and path.name != "structure.py"

"""nn.Module -> graph, for the whole model where that is faithful, and for its parts where it is not."""

from __future__ import annotations

import inspect
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from tdfx.passes.base import Change, Pass, PassResult, Program
from tdfx.passes.tracer import is_site_or_leaf, trace_once
from tdfx.structure import HOOKS, structural_copy

_TORCH = Path(torch.__file__).parent
_OWN_METHODS = frozenset({"__init__", "forward", "extra_repr"})
"""What a module class may define for itself without changing how a module behaves otherwise."""


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
        root = attempts.get("", Attempt(doubt="the model is itself one layer"))
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
    constants = False
    for mode in (True, False):
        copy = structural_copy(module).train(mode)
        try:
            graph, traced = trace_once(copy)
        except Exception as error:  # what a user's forward raises when it meets a Proxy can be of any class
            return Attempt(doubt=_why_not(error))
        graphs.append(graph)
        constants |= set(traced.__dict__) != set(copy.__dict__) or len(_tensors(traced)) != len(_tensors(copy))
    if _code(graphs[0]) != _code(graphs[1]):
        return Attempt(tuple(graphs), "its forward is not the same in train and in eval mode")
    if constants:
        return Attempt((graphs[0],), "its forward makes tensors that a graph would freeze")
    return Attempt((graphs[0],), _doubt(module))


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


def _code(graph: fx.Graph) -> str:
    return str(graph.python_code("self").src)


def _tensors(module: nn.Module) -> list[tuple[str, int]]:
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return [(name, id(tensor)) for name, tensor in named]


def _doubt(module: nn.Module) -> str:
    """Return why a GraphModule could not stand for this module although its forward traces; "" if it can."""
    if isinstance(module, fx.GraphModule):
        return ""
    inner = [child for child in module.modules() if child is not module and not is_site_or_leaf(child)]
    if any(child.__dict__[name] for child in inner for name in HOOKS):
        return "a block inside it has hooks, which a graph would not call"
    optional = [
        parameter.name
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is not inspect.Parameter.empty
    ]
    if optional:
        return f"its forward has the optional argument {optional[0]!r}, and a graph would fix one case of it"
    overridden = _overridden(type(module))
    if overridden:
        return f"{type(module).__name__} has its own {overridden[0]}(), which a graph would not have"
    own = {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
    taken = sorted(own & _GRAPH_MODULE_NAMES)
    if taken:
        return f"its attribute {taken[0]!r} has a name that GraphModule uses itself"
    return ""


def _overridden(kind: type[nn.Module]) -> list[str]:
    """Return the methods of nn.Module that a class or its bases redefine."""
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base not in {nn.Module, nn.Sequential}]
    plumbing = set(vars(nn.Module)) - _OWN_METHODS
    return sorted(name for base in bases for name, value in vars(base).items() if name in plumbing and callable(value))


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


_GRAPH_MODULE_NAMES = (set(fx.GraphModule(nn.Module(), fx.Graph()).__dict__) | set(vars(fx.GraphModule))) - set(
    nn.Module().__dict__
)
"""Attributes by which a GraphModule holds its own state; a model that uses one of them cannot become a graph."""

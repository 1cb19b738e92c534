"""nn.Module -> graphs: of the whole model where a graph is faithful, and of its parts where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from tdfx.kinds.registry import is_candidate
from tdfx.layers.copying import COMPILED, structural_copy
from tdfx.layers.factorized import Factorized
from tdfx.passes.analysis.trace_module import ModuleTracer
from tdfx.passes.analysis.tracer import is_site_or_leaf
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import Program, Traced


class Trace(Pass[PassResult]):
    """Make a structural copy of the model and record the graphs of as much of it as torch.fx can follow."""

    name = "trace"

    def run(self, program: Program) -> PassResult:
        """Trace the root and, where that fails, its children, down to single layers."""
        module = structural_copy(program.module)
        tracer = ModuleTracer(_compiled_modules(program.module, module))
        traces = dict(_trace_tree(module, "", tracer))
        graphs = {path: traced for path, traced in traces.items() if traced.graphs}
        root = traces.get("") or Traced((), _why_not_looked_into(module))
        emit, notes = program.emit, program.notes
        if emit == "graph" and root.mismatch:
            emit = "modules"
            notes = (*notes, f"given back as {type(module).__name__}, not as a graph: {root.mismatch}")
        elif emit == "graph":
            notes = (*notes, *_notes_of_opaque(module, root))
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


def _notes_of_opaque(module: nn.Module, root: Traced) -> list[str]:
    counts = Counter((type(module.get_submodule(path)).__name__, why) for path, why in root.opaque.items())
    return [f"the graph calls {count} {name} as it is: {why}" for (name, why), count in counts.items()]


def _why_not_looked_into(module: nn.Module) -> str:
    if is_candidate(module) or isinstance(module, Factorized):
        return "the model is itself one layer"
    return f"torch.fx does not look inside {type(module).__name__}, which torch.nn runs as a whole"


def _tensors(module: nn.Module) -> list[tuple[str, int]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor)) for name, tensor in named]

"""Check on forwards written at random that a rewritten model does what the model did.

Each program is a small model out of what the forwards of users do beside computing: assignments in place, contexts, state
kept anywhere, random generators, code that looks at what flows through it, modules made in forward and more
(tools/forward_programs.py). It is rewritten at full rank in float64, with and without example inputs, and called three times
in each mode beside a twin that tdfx never saw. Before the third call something is changed in both, as a training loop may do
it: a number, a layer, a hook. Outputs and their types, gradients, all that is left behind, and the random
generators must be the same each time; and planning must leave everything as it was. The exit code is 1 if any program fails.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import click
import numpy as np
import options
import torch
from bench_common import show_progress
from forward_programs import Program
from torch import Tensor, fx, nn

import tdfx
from tdfx.layers.module_state import MODULE_STATE

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
TOLERANCE = 1e-8
"""Relative difference in float64 that counts as none: six sums of six terms, which a program multiplies by itself."""
ROUNDING = 1e-12
"""Share of the largest number of a call that counts as zero: what is left where numbers of that size cancel out."""
_ALONE = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, type, np.generic)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program."""

    kind: str
    """``right``, ``wrong``, ``refused``, or ``fails`` if the model itself fails."""
    emit: str = ""
    sites: int = 0
    detail: str = ""


class DifferenceError(Exception):
    """Two models did not do the same."""


@options.command(__doc__)
@click.option("--programs", default=2000, show_default=True, help="So many programs.")
@click.option("--first", default=0, show_default=True, help="The seed of the first program; each has the next one.")
@click.option("--show", is_flag=True, help="Print the forwards of the programs that fail.")
def main(programs: int, first: int, show: bool) -> None:
    """Examine programs and count what became of them."""
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for seed in map(int, show_progress([str(seed) for seed in range(first, first + programs)])):
        program = Program(random.Random(seed))
        for inputs, outcome in zip(("with", "without"), examine(program), strict=False):
            counts[f"{outcome.kind} {outcome.emit}".strip()] += 1
            if outcome.kind == "wrong":
                click.echo(f"{seed} {inputs} example inputs: {outcome.detail}")
                if show:
                    click.echo(program.text[program.text.index("class Block") :])
    click.echo(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    click.echo(f"{programs} programs, with and without example inputs, in {time.perf_counter() - started:.0f} s")
    if any(kind.startswith("wrong") for kind in counts):
        sys.exit(1)


def examine(program: Program) -> list[Outcome]:
    """Rewrite a program's model with and without example inputs; compare it with a twin, in three calls in each mode."""
    calls = [call for mode in (True, False) for call in _calls(program, mode)]
    with warnings.catch_warnings(action="ignore"):
        twin = _Run(program)
        wanted: list[Any] = []
        for call in calls:
            try:
                wanted.append(twin.observe(*call))
            except Exception as error:  # whatever the program raises
                wanted.append(error)
        if isinstance(wanted[0], Exception):
            return [Outcome("fails")]
        return [_examine(program, inputs, calls, wanted) for inputs in (calls[0][0], None)]


def _examine(program: Program, inputs: Any, calls: list[Any], wanted: list[Any]) -> Outcome:
    run = _Run(program)
    before, emit, sites = run.facts(), "", 0
    try:
        if inputs is not None:
            tdfx.plan(run.model, FULL, example_inputs=inputs)
            _compare(run.facts(), before, "after planning")
        result = tdfx.rewrite(run.model, FULL, example_inputs=inputs)
        _compare(run.facts(), before, "after rewriting")
        emit = "graph" if isinstance(result, fx.GraphModule) else "modules"
        sites = sum(isinstance(module, tdfx.Factorized) for module in result.modules())
        run.hidden = vars(result).keys() - vars(run.model).keys()
        run.model = result
        for index, (call, want) in enumerate(zip(calls, wanted, strict=True)):
            _check(run, call, want, f"call {index % 3} in {'train' if call[2] else 'eval'} mode")
    except tdfx.TdfxError as error:
        return Outcome("refused", detail=str(error).splitlines()[0])
    except DifferenceError as difference:
        return Outcome("wrong", emit, sites, str(difference))
    return Outcome("right", emit, sites)


def _check(run: _Run, call: Any, want: Any, where: str) -> None:
    try:
        got = run.observe(*call)
    except Exception as error:
        if isinstance(want, Exception):
            return
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise DifferenceError(f"{where}: raises {error!r} ({line.name}:{line.lineno})") from error
    if isinstance(want, Exception):
        raise DifferenceError(f"{where}: does not raise {want!r}")
    _compare(got, want, where, ROUNDING * _largest(want))


def _calls(program: Program, training: bool) -> Iterator[tuple[tuple[Any, ...], Any, bool, str]]:
    """Yield arguments, context, mode, and what to change before it, of three calls, of which the second has more rows."""
    numbers = torch.Generator().manual_seed(1)
    for index, rows in enumerate((3, 5, 3)):
        x, other = (torch.randn(rows, 6, dtype=torch.float64, generator=numbers) for _ in range(2))
        arguments: tuple[Any, ...] = {
            "plain": (x,),
            "optional": (x, None if index else other),
            "rest": (x, other) if index else (x,),
            "either": (({"h": x}, [x], x)[index],),
        }[program.arguments]
        change = program.change if training and index == 2 else "pass"
        under = torch.autocast("cpu") if index == 2 else contextlib.nullcontext() if training else torch.no_grad()
        yield arguments, under if index else contextlib.nullcontext(), training, change


class _Run:
    """A model, the names of its file, and what it does."""

    def __init__(self, program: Program) -> None:
        _seed()
        self.names = program.names()
        self.model: nn.Module = self.names["Net"]().double().train()
        self.hidden: Set[str] = set()
        """The names of what tdfx keeps in a rewritten model."""

    def observe(self, arguments: tuple[Any, ...], context: Any, training: bool, change: str) -> dict[str, Any]:
        """Change the model, call it forward and backward, and return what it gave, and what there is afterwards."""
        _seed()
        exec(change, self.names, {"model": self.model})
        self.model.train(training)
        self.model.zero_grad()
        leaves: list[Tensor] = []
        _seed()
        grad = torch.is_grad_enabled()

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.clone().requires_grad_())
            return leaves[-1] * 1  # no leaf itself, so that a forward may change it in place

        given = _map(arguments, leaf)
        try:
            with context:
                output = self.model(*given)
            sums = [x.double().square().sum() for x in _tensors(output) if x.requires_grad]
            if sums:
                torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
        finally:
            torch.set_grad_enabled(grad)
        gradients = [leaf.grad for leaf in leaves]
        return {"output": _facts(output), "gradients of inputs": _facts(gradients), **self.facts()}

    def facts(self) -> dict[str, Any]:
        """Return all that there is, to be compared: what the model holds, its file, its classes, random generators."""
        named = dict(self.model.named_parameters())
        contexts = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
        facts = {
            "contexts": contexts,
            "random generators": _facts((torch.get_rng_state(), random.getstate(), np.random.get_state())),
            "modes": {path: module.training for path, module in self.model.named_modules()},
            "parameters": {name: _facts(parameter) for name, parameter in named.items()},
            "gradients": {name: _facts(parameter.grad) for name, parameter in named.items()},
        }
        for path, module in self.model.named_modules():
            held = {name: vars(module)[name] for name in sorted(vars(module).keys() - MODULE_STATE - self.hidden)}
            facts[f"model {path}"] = _facts(held if path in {"", "block"} else {}), _facts(module._buffers)
        for name, value in self.names.items():
            if not name.startswith("__"):
                facts[f"file: {name}"] = _facts(dict(vars(value)) if isinstance(value, type) else value)
        return facts


def _facts(value: Any, depth: int = 8) -> Any:
    """Return what can be compared of a value: its class, and its contents."""
    kind = type(value).__qualname__
    if isinstance(value, fx.Proxy) or depth == 0:
        return f"a {kind}"
    if isinstance(value, Tensor):
        return kind, value.dtype, value.requires_grad, value.detach().clone()
    if isinstance(value, _ALONE):
        return kind, value.__qualname__ if isinstance(value, type) else value
    if isinstance(value, np.ndarray):
        return kind, value.tolist()
    if isinstance(value, dict):
        items = {key: _facts(item, depth - 1) for key, item in value.items() if not str(key).startswith("__")}
        return kind, list(items), items
    if isinstance(value, list | tuple | deque):
        return kind, [_facts(item, depth - 1) for item in value]
    if isinstance(value, set | frozenset):
        return kind, sorted(map(str, value))
    if isinstance(value, random.Random):
        return kind, value.getstate()
    if isinstance(value, np.random.RandomState):
        return kind, _facts(value.get_state())
    if isinstance(value, np.random.Generator):
        return kind, str(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return kind, _facts(value.get_state())
    if isinstance(value, nn.Module | ModuleType):
        return kind
    if isinstance(value, FunctionType):
        return kind, _facts(dict(vars(value)), depth - 1)
    slots = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
    return kind, _facts({**getattr(value, "__dict__", {}), **slots}, depth - 1)


def _largest(facts: Any) -> float:
    """Return the largest size of a number in what was observed: of inputs' gradients, weights, outputs and all else."""
    if isinstance(facts, Tensor):
        sizes = facts.abs().nan_to_num(0.0, 0.0) if facts.is_floating_point() and facts.numel() else torch.zeros(1)
        return float(sizes.max())
    if isinstance(facts, float):
        return abs(facts) if math.isfinite(facts) else 0.0
    held = facts.values() if isinstance(facts, dict) else facts if isinstance(facts, list | tuple) else ()
    return max(map(_largest, held), default=0.0)


def _compare(got: Any, want: Any, where: str, rounding: float = 0.0) -> None:
    """Raise DifferenceError where facts differ by more than ``TOLERANCE`` of themselves and by more than ``rounding``."""
    if isinstance(want, dict) and isinstance(got, dict):
        for key in want.keys() & got.keys() if where.endswith(("parameters", "gradients", "modes")) else want:
            if key not in got and not str(key).startswith("model "):
                raise DifferenceError(f"{where}: {key} is missing")
            if key in got:
                _compare(got[key], want[key], f"{where}: {key}", rounding)
    elif isinstance(want, Tensor) and isinstance(got, Tensor):
        if got.shape != want.shape or got.dtype != want.dtype or not _is_near(got, want, rounding):
            raise DifferenceError(f"{where}: {got} is not {want}")
    elif isinstance(want, list | tuple) and isinstance(got, list | tuple) and len(got) == len(want):
        for one, other in zip(got, want, strict=True):
            _compare(one, other, where, rounding)
    elif isinstance(want, float) and isinstance(got, float):
        if not _is_near(torch.tensor(got), torch.tensor(want), rounding):
            raise DifferenceError(f"{where}: {got} is not {want}")
    elif type(got) is not type(want) or got != want:
        raise DifferenceError(f"{where}: {str(got)[:200]} is not {str(want)[:200]}")


def _is_near(got: Tensor, want: Tensor, rounding: float) -> bool:
    if not want.is_floating_point():
        return torch.equal(got, want)
    scale = float(want.abs().nan_to_num(posinf=0.0).max()) if want.numel() else 0.0
    return torch.allclose(got, want, rtol=TOLERANCE, atol=max(TOLERANCE * scale, rounding), equal_nan=True)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [
        x for each in (held or vars(value).values() if hasattr(value, "__dict__") else held) for x in _tensors(each)
    ]


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, _map(item, change)) for key, item in value.items())
    return type(value)(_map(item, change) for item in value) if isinstance(value, list | tuple) else value


def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


if __name__ == "__main__":
    main()

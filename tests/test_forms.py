"""What people do with a rewritten model: trace, script, export, torch.func, copies, pickles and other processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, fx, nn
from torch.multiprocessing.spawn import spawn

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
TOLERANCE = 1e-9  # relative, in float64: a few products of sixteen terms
EMITS: tuple[tdfx.Emit, ...] = ("graph", "modules")
# torch.jit is deprecated; people still use it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
every_emit = pytest.mark.parametrize("emit", EMITS)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.inner(x)).relu())  # type: ignore[no-any-return]


class TwoModes(nn.Module):
    """Returns something else in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Residual(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.body(x))
        return (y, y.sum()) if self.training else y


def chain() -> nn.Module:
    return nn.Sequential(Residual(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))


BUILDS: list[Callable[[], nn.Module]] = [chain, TwoModes]
every_build = pytest.mark.parametrize("build", BUILDS)


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def rewritten(build: Callable[[], nn.Module], emit: tdfx.Emit, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    result = tdfx.rewrite(build().double().eval(), FULL, example_inputs=(batch(),), emit=emit)
    assert isinstance(result, fx.GraphModule) == (emit == "graph")
    assert sum(isinstance(module, tdfx.Factorized) for module in result.modules()) >= 2
    return result


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@every_emit
@every_build
def test_torch_jit_trace(build: Callable[[], nn.Module], emit: tdfx.Emit) -> None:
    model = rewritten(build, emit)
    traced = torch.jit.trace(model, (batch(),))  # type: ignore[no-untyped-call]
    assert_same(traced(batch(6)), model(batch(6)))


@every_emit
@every_build
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_export(build: Callable[[], nn.Module], emit: tdfx.Emit, dynamic: bool) -> None:
    model = rewritten(build, emit)
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},) if dynamic else None
    exported: Any = torch.export.export(model, (batch(),), dynamic_shapes=shapes).module()
    assert_same(exported(batch()), model(batch()))
    if dynamic:
        assert_same(exported(batch(9)), model(batch(9)))


@every_emit
def test_torch_jit_script_where_the_dense_model_scripts(emit: tdfx.Emit) -> None:
    torch.jit.script(chain())
    model = rewritten(chain, emit)
    assert_same(torch.jit.script(model)(batch(5)), model(batch(5)))


@every_emit
@every_build
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_torch_func_calls_it_with_other_parameters(
    build: Callable[[], nn.Module], emit: tdfx.Emit, training: bool
) -> None:
    model, other = (rewritten(build, emit, seed).train(training) for seed in (0, 1))
    given = {name: value.detach().clone() for name, value in (*other.named_parameters(), *other.named_buffers())}
    torch.manual_seed(3)
    got = torch.func.functional_call(model, given, (batch(),))
    torch.manual_seed(3)
    assert_same(got, other(batch()))


@every_emit
@every_build
def test_torch_func_stacks_two(build: Callable[[], nn.Module], emit: tdfx.Emit) -> None:
    models = [rewritten(build, emit, seed) for seed in (0, 1)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = batch()

    def run(*state: Any) -> Any:
        return torch.func.functional_call(models[0], state, (x,))

    outputs = torch.vmap(run)(parameters, buffers)
    for index, model in enumerate(models):
        assert_same(outputs[index], model(x))


@every_emit
@every_build
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_models_of_their_own(
    build: Callable[[], nn.Module], emit: tdfx.Emit, how: str, tmp_path: Any
) -> None:
    model = rewritten(build, emit)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    expected = model.eval()(batch())
    assert_same(copied.eval()(batch()), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert_same(model(batch()), expected)
    assert_same(tdfx.merge(model)(batch()), expected)
    torch.manual_seed(1)
    copied.train()(batch())


def sends_back(_: int, models: list[nn.Module], queue: Any) -> None:
    for model in models:
        queue.put(model(batch()).tolist())


def test_a_process_that_is_spawned_gets_the_model() -> None:
    models = [rewritten(build, emit) for build in BUILDS for emit in EMITS]
    queue = mp.get_context("spawn").SimpleQueue()
    spawn(sends_back, args=(models, queue), nprocs=1)  # type: ignore[no-untyped-call]
    for model in models:
        assert_same(torch.tensor(queue.get(), dtype=torch.float64), model(batch()))

"""Moments of models that torch.compile has compiled, that are traced or exported, or that run under modes of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.matrix = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.second(self.first(x)), self.matrix)


PATHS = ("first.linear.weight", "second.linear.weight", "matrix")
X = torch.randn(16, 8)

# Dynamo reads the gradient of every input of compiled code, and hides the warning unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Counter:
    """A backend that counts what it compiles and how often compiled code runs."""

    def __init__(self) -> None:
        self.compiled = 0
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


def wrapped(model: Net, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: Net, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def wrapped_part(model: Any, backend: Any) -> Any:
    model.first = torch.compile(model.first, backend=backend)
    return model


def part_in_place(model: Net, backend: Any) -> Any:
    model.second.compile(backend=backend)
    return model


def twice(model: Net, backend: Any) -> Any:
    return torch.compile(in_place(model, backend), backend=backend)


FORMS = [wrapped, in_place, wrapped_part, part_in_place, twice]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def step(model: Any) -> Tensor:
    loss: Tensor = model(X).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("warm", [True, False])
def test_a_compiled_model_is_recorded_and_compiled_code_comes_back(form: Callable[..., Any], warm: bool) -> None:
    counter = Counter()
    model = form(net(), counter)
    loss = step(model) if warm else None
    compiled, runs = counter.compiled, counter.runs
    with tdfx.Moments(model, _share=1.0) as moments:
        losses = [step(model) for _ in range(3)]
    assert loss is None or all(torch.equal(again, loss) for again in losses)
    assert (counter.compiled, counter.runs) == (compiled, runs), "the compiled code was called"
    assert moments.units == 3
    plain = net()
    with tdfx.Moments(plain, _share=1.0) as expected:
        for _ in range(3):
            step(plain)
    for path in PATHS:
        old, new = expected.of(path), moments.of(path)
        assert old is not None
        assert new is not None
        torch.testing.assert_close(new.inputs, old.inputs)
        torch.testing.assert_close(new.outputs, old.outputs)
    step(model)
    assert counter.runs > runs
    # Code that was compiled before fits again; else it is compiled once.
    now = counter.compiled
    assert now == compiled if warm else now > 0
    step(model)
    assert counter.compiled == now
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_bit_of_the_training_changes(backend: str) -> None:
    def losses(attached: bool) -> list[Tensor]:
        torch._dynamo.reset()
        model = wrapped(net(), backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        moments = tdfx.Moments(model) if attached else None
        values = []
        for _ in range(3):
            optimizer.zero_grad()
            values.append(step(model))
            optimizer.step()
        if moments is not None:
            assert moments.units == 3
            moments.remove()
        values.append(step(model))
        return values

    torch.testing.assert_close(losses(True), losses(False), rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_a_compiled_part_is_recorded_outside_of_the_forward_of_the_model(compiled: Callable[..., Any]) -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = compiled(net(), counter)

        def training_step(self) -> Any:
            return self.net(X).square().mean()

    counter = Counter()
    model = Trained()
    with tdfx.Moments(model) as moments:
        for _ in range(2):
            model.training_step().backward()
    assert moments.units == 2
    assert counter.runs == 0
    for path in PATHS:
        assert moments.of(f"net.{path}") is not None
    model.training_step()
    assert counter.runs > 0


def test_a_collector_that_is_gone_leaves_compiled_code() -> None:
    import gc

    counter = Counter()
    model = in_place(net(), counter)
    tdfx.Moments(model)
    gc.collect()
    step(model)
    assert counter.runs == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_step_around_the_model_goes_on_and_is_not_recorded(fullgraph: bool) -> None:
    counter = Counter()
    model = net()

    @torch.compile(backend=counter, fullgraph=fullgraph)
    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().mean()  # type: ignore[no-any-return]

    loss_of(X).backward()  # type: ignore[no-untyped-call]
    compiled = counter.compiled
    with tdfx.Moments(model) as moments:
        for _ in range(3):
            loss_of(X).backward()  # type: ignore[no-untyped-call]
    assert counter.compiled <= compiled + 1
    loss_of(X).backward()  # type: ignore[no-untyped-call]
    assert counter.compiled <= compiled + 1
    assert counter.runs >= 5
    assert moments.units == 0
    step(model)


def test_a_validation_between_steps_compiles_nothing() -> None:
    counter = Counter()
    model = wrapped(net(), counter)
    with tdfx.Moments(model) as moments:
        step(model)
        with torch.no_grad():
            model(X)
        step(model)
    assert moments.units == 2
    assert counter.compiled == 0


def test_the_stance_of_the_user_comes_back() -> None:
    model = wrapped(net(), "eager")
    stances = []
    with torch.compiler.set_stance("eager_on_recompile"), tdfx.Moments(model):
        step(model)
        stances.append(str(torch._dynamo.eval_frame._stance.stance))
    stances.append(str(torch._dynamo.eval_frame._stance.stance))
    assert stances == ["eager_on_recompile", "default"]


def test_a_trace_and_an_export_are_not_recorded() -> None:
    model = net()
    with tdfx.Moments(model) as moments:
        with warnings.catch_warnings(action="ignore"):
            torch.jit.trace(model, X, check_trace=False)  # type: ignore[no-untyped-call]
        program = torch.export.export(model, (X,))
        assert moments._waiting == type(moments._waiting)()
        step(model)
    assert moments.units == 1
    torch.testing.assert_close(program.module()(X), model(X))


def test_transforms_are_not_recorded() -> None:
    model = net()
    with tdfx.Moments(model) as moments:
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).square().mean())(parameters)
        assert moments.units == 0
        step(model)
    assert moments.units == 1


def test_the_modes_of_the_user_see_only_the_training() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for attached in (False, True):
        model = net()
        moments = tdfx.Moments(model) if attached else None
        with FlopCounterMode(display=False) as counter:
            step(model)
        counts.append(counter.get_total_flops())
    assert moments is not None
    assert moments.units == 1
    assert counts[0] == counts[1] > 0

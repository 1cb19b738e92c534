"""Hooks that outlive the original, wrappers at the root, modes, empty batches, frozen layers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tdfx
from tdfx.layers.paths import parameters_by_path

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
EMITS: tuple[tdfx.Emit, ...] = ("graph", "modules")
every_emit = pytest.mark.parametrize("emit", EMITS)


def batch() -> Tensor:
    return torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).double()


class Hooked(nn.Module):
    """Has one hook of each public kind for saving and loading, on itself and on a layer, and a weak reference to itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.out = nn.Linear(16, 32), nn.Linear(32, 4)
        self.double()
        self.calls: list[tuple[str, Any]] = []
        self.me = weakref.ref(self)
        modules: list[Any] = [self, self.stem]
        for module in modules:
            module.register_state_dict_pre_hook(lambda module, *_: self.calls.append(("before saving", module)))
            module.register_state_dict_post_hook(lambda module, *_: self.calls.append(("after saving", module)))
            module.register_load_state_dict_pre_hook(lambda module, *_: self.calls.append(("before loading", module)))
            module.register_load_state_dict_post_hook(lambda module, *_: self.calls.append(("after loading", module)))

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.out(self.stem(x).relu()))


def check_hooks(model: Any) -> None:
    gc.collect()
    model.calls.clear()
    model.load_state_dict(model.state_dict())
    times = ("before saving", "after saving", "before loading", "after loading")
    for module in (model, model.stem):
        assert {time for time, called in model.calls if called is module} == set(times)
    assert all(called in {model, model.stem} for _, called in model.calls)
    assert model.me() is model


@every_emit
def test_hooks_of_saving_and_loading_outlive_the_original(emit: tdfx.Emit) -> None:
    model = tdfx.rewrite(Hooked(), HALF, emit=emit)
    assert isinstance(model.stem, tdfx.Factorized)
    check_hooks(model)
    merged = tdfx.merge(model)
    check_hooks(merged)
    del model
    check_hooks(merged)


@every_emit
def test_the_original_keeps_its_own_hooks(emit: tdfx.Emit) -> None:
    model = Hooked()
    rewritten = tdfx.rewrite(model, HALF, emit=emit)
    check_hooks(model)
    assert not cast("Any", rewritten).calls


@every_emit
def test_a_checkpoint_wrapper_inside_outlives_the_original(emit: tdfx.Emit) -> None:
    model = tdfx.rewrite(nn.Sequential(checkpoint_wrapper(mlp()), nn.Linear(4, 4)).double(), HALF, emit=emit)
    gc.collect()
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy.deepcopy(model)(batch()), model(batch()))


@every_emit
def test_a_checkpoint_wrapper_at_the_root_is_merged_saved_and_loaded(emit: tdfx.Emit, tmp_path: Any) -> None:
    def wrapped() -> nn.Module:
        return checkpoint_wrapper(mlp())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()

    model = wrapped()
    assert next(name for name, _ in parameters_by_path(model)) == "_checkpoint_wrapped_module.0.weight"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer)
    result = tdfx.rewrite(model, HALF, optimizer=optimizer, emit=emit)
    train(result, optimizer)
    tdfx.save(result, tmp_path / "run.tdfx", optimizer=optimizer)
    other_model = wrapped()
    other = torch.optim.AdamW(other_model.parameters(), lr=1e-2)
    again = tdfx.load(tmp_path / "run.tdfx", other_model, optimizer=other)
    for _ in range(2):
        train(result, optimizer)
        train(again, other)
    assert all(map(torch.equal, result.state_dict().values(), again.state_dict().values()))
    from_meta = tdfx.load(tmp_path / "run.tdfx", wrapped().to("meta"))
    assert not any(parameter.is_meta for parameter in from_meta.parameters())
    merged = tdfx.merge(result, optimizer=optimizer)
    torch.testing.assert_close(merged(batch()), result(batch()))
    mlp().load_state_dict(merged.state_dict(), strict=True)


def clamped(layer: Any, _: Any) -> None:
    with torch.no_grad():
        layer.weight.clamp_(-0.01, 0.01)


def by_data(layer: Any, _: Any) -> None:
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.1)


def by_helper(layer: Any, _: Any) -> None:
    clamped(layer, _)


def by_parameters(layer: Any, _: Any) -> None:
    for parameter in layer.parameters():
        parameter.data.clamp_(-0.01, 0.01)


class Clamp:
    """A hook that is an object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, layer: nn.Module, _: Any) -> None:
        layer.get_parameter(self.name).data.clamp_(-0.01, 0.01)


@every_emit
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("hook", [clamped, by_data, by_helper, by_parameters, Clamp("weight")])
@pytest.mark.parametrize("path", ["2", ""])
def test_the_weight_that_a_hook_writes_is_kept(hook: Any, inputs: bool, emit: tdfx.Emit, path: str) -> None:
    dense, model = mlp(), mlp()
    if path == "" and hook is not by_parameters:
        return
    for each in (dense, model):
        each.get_submodule(path).register_forward_pre_hook(hook)
    example = {"example_inputs": (batch(),)} if inputs else {}
    plan = tdfx.plan(model, FULL, emit=emit, **example)  # type: ignore[arg-type]
    kept = {site.name: site.reason for site in plan if not site.factorized}
    assert kept == dict.fromkeys(["2"] if path else ["0", "2", "4"], tdfx.Reason.READ_ELSEWHERE)
    for result in (tdfx.rewrite(model, plan), tdfx.rewrite(model, FULL, emit=emit, **example)):  # type: ignore[arg-type]
        for _ in range(2):
            torch.testing.assert_close(result(batch()), dense(batch()))


def test_a_hook_that_does_not_look_at_the_weight_keeps_nothing() -> None:
    model = mlp()
    shapes: list[Any] = []
    model[2].register_forward_pre_hook(lambda layer, x: (x[0] * 2,))
    model[2].register_forward_hook(lambda layer, x, y: shapes.append((layer.training, y.detach().shape)))
    for example in ({}, {"example_inputs": (batch(),)}):
        assert all(site.factorized for site in tdfx.plan(model, FULL, **example))  # type: ignore[arg-type]
    torch.testing.assert_close(tdfx.rewrite(model, FULL)(batch()), model(batch()))


def test_inference_mode_is_refused_before_anything_changes() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewritten = tdfx.rewrite(model, HALF, optimizer=optimizer)
    held = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    actions: tuple[Callable[[], nn.Module], ...] = (
        lambda: tdfx.rewrite(mlp(), HALF),
        lambda: tdfx.rewrite(rewritten, tdfx.Policy(rank=tdfx.Ratio(of=0.1), min_gain=0), optimizer=optimizer),
        lambda: tdfx.merge(rewritten, optimizer=optimizer),
    )
    for act in actions:
        with torch.inference_mode(), pytest.raises(tdfx.ModelError, match=r"torch.inference_mode\(\), where every new"):
            act()
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == held
    with torch.no_grad():
        assert tdfx.merge(rewritten, optimizer=optimizer)(batch()).shape == (8, 4)


class Experts(nn.Module):
    """Sends all rows to the first of two experts; calls a third with no rows and with all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused, self.both = (nn.Linear(64, 64) for _ in range(3))
        self.kernel = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        none = x[x.sum(-1) > 1e9]
        y = self.used(x) + self.both(x) + self.both(none).sum() + self.unused(none).sum()
        return cast("Tensor", y + nn.functional.linear(none, self.kernel).sum())


@every_emit
def test_a_site_that_gets_no_values_is_kept(emit: tdfx.Emit) -> None:
    x = torch.randn(64, 64)
    for policy in (tdfx.Policy(), HALF, tdfx.Policy(cost=tdfx.Measured(budget=1), rank=tdfx.Ratio(of=0.25))):
        plan = tdfx.plan(Experts(), policy, example_inputs=(x,), emit=emit)
        reasons = {site.name: (site.reason, site.note) for site in plan}
        expected = (tdfx.Reason.NOT_CALLED, "the example inputs send no values through it")
        assert reasons["unused"] == reasons["kernel"] == expected
        assert reasons["used"][0] is not tdfx.Reason.NOT_CALLED
        assert reasons["both"][0] is not tdfx.Reason.NOT_CALLED
        assert tdfx.rewrite(Experts(), plan)(x).shape == x.shape


def test_values_are_loaded_into_layers_that_were_frozen_since() -> None:
    plan, source = tdfx.plan(mlp(), HALF), tdfx.rewrite(mlp(), HALF)
    model = mlp()
    model[2].requires_grad_(False)
    with pytest.raises(tdfx.PlanError, match="'2', which must be kept: frozen"):
        tdfx.rewrite(model, plan)
    result = tdfx.rewrite(model, plan, init="empty")
    result.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(result(batch()), source(batch()))
    frozen = {name.partition(".")[0] for name, parameter in result.named_parameters() if not parameter.requires_grad}
    assert frozen == {"2"}
    assert not tdfx.merge(result).get_parameter("2.weight").requires_grad


def test_a_rewritten_model_with_hooks_can_be_pickled() -> None:
    for emit in EMITS:
        model = tdfx.rewrite(checkpoint_wrapper(mlp()), HALF, emit=emit)
        again = pickle.loads(pickle.dumps(model))
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again(batch()), model(batch()))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_rewritten_model_can_be_scripted() -> None:
    for emit in EMITS:
        model = tdfx.rewrite(mlp(), HALF, emit=emit)
        torch.testing.assert_close(torch.jit.script(model)(batch()), model(batch()))
        assert not any(isinstance(module, tdfx.Factorized) for module in tdfx.merge(model).modules())
    upsample = tdfx.rewrite(nn.Sequential(nn.ConvTranspose2d(8, 8, 3, stride=2)), HALF)
    scripted = torch.jit.script(upsample.get_submodule("0"))
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(scripted(x), upsample(x))
    with pytest.raises(Exception, match="factors take no output_size in TorchScript"):
        scripted(x, [10, 10])

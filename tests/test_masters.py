"""Models in half precision whose optimizer trains masters: wider copies of their parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

import tdfx
from tdfx import Factorized, OptimizerError

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
TYPES = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]
X = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(3))

Masters = dict[nn.Parameter, nn.Parameter]


class Net(nn.Module):
    """Has a convolution, a grouped transposed one, a norm, a linear layer, and a parameter that it passes to F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(12, 8, 3, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(200, 20)
        self.kernel = nn.Parameter(torch.randn(10, 20) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(self.norm(self.up(self.conv(x).relu())).flatten(1)).relu(), self.kernel)


SITES = ("conv", "up", "fc", "kernel")


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def pair(dtype: torch.dtype = torch.bfloat16, wide: torch.dtype = torch.float32) -> tuple[Net, Masters, Net]:
    """Return a model, its masters with more digits than the model, and a wide model with the masters' values."""
    reference = net().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=1e-3)
    reference.to(wide)
    model = copy.deepcopy(reference).to(dtype)
    others = zip(model.parameters(), reference.parameters(), strict=True)
    return model, {parameter: nn.Parameter(value.detach().clone()) for parameter, value in others}, reference


def set_gradients(parameters: Iterable[Tensor], seed: int) -> None:
    """Give parameters gradients that depend on their shapes and their order alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(optimizer: Optimizer, parameters: Iterable[Tensor], seeds: Iterable[int]) -> None:
    tensors = list(parameters)
    for seed in seeds:
        set_gradients(tensors, seed)
        optimizer.step()


def copy_to_model(masters: Masters) -> None:
    """Copy masters into the model, as a training loop does after each step."""
    with torch.no_grad():
        for parameter, master in masters.items():
            parameter.copy_(master)


def train(model: nn.Module, masters: Masters, optimizer: Optimizer, count: int) -> list[float]:
    losses = []
    dtype = next(iter(masters)).dtype
    target = torch.arange(16) % 10
    for _ in range(count):
        loss = F.cross_entropy(model(X.to(dtype)).float(), target)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, master in masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        optimizer.step()
        copy_to_model(masters)
        losses.append(float(loss.detach()))
    return losses


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.02, momentum=0.9)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=3e-3)


def trained(build: Any = sgd, **types: torch.dtype) -> tuple[Net, Masters, Optimizer]:
    model, masters, _ = pair(**types)
    optimizer = build(masters.values())
    train(model, masters, optimizer, 3)
    return model, masters, optimizer


def masters_of(masters: Masters, model: nn.Module) -> list[nn.Parameter]:
    """Return the masters in the order of the model's parameters."""
    return [masters[parameter] for parameter in model.parameters()]


def dense(model: nn.Module, name: str) -> Tensor:
    parameter: Any = model.get_parameter(name) if name == "kernel" and "kernel" in model._parameters else None
    return cast("Tensor", model.get_submodule(name).weight if parameter is None else parameter).detach()


def relative_distance(value: Tensor, other: Tensor) -> float:
    return float((value.double() - other.double()).norm() / other.double().norm())


def joined(masters: Masters, layer: Factorized) -> Tensor:
    return layer.kind.from_dense(layer.join(*(masters[weight].detach().double() for weight in layer.weights)))


@pytest.mark.parametrize("build", [sgd, adamw])
@pytest.mark.parametrize(("dtype", "wide"), TYPES)
def test_masters_train_to_the_same_bits_as_a_wide_model(build: Any, dtype: torch.dtype, wide: torch.dtype) -> None:
    model: nn.Module
    model, masters, reference = pair(dtype, wide)
    optimizer, other = build(masters.values()), build(reference.parameters())
    wide_model: nn.Module = reference
    steps(optimizer, masters.values(), range(3))
    steps(other, wide_model.parameters(), range(3))
    copy_to_model(masters)
    for number, policy in enumerate((HALF, QUARTER, None)):
        if policy is None:
            model = tdfx.merge(model, optimizer=optimizer, masters=masters)
            wide_model = tdfx.merge(wide_model, optimizer=other)
        else:
            plan = tdfx.plan(model, policy)
            model = tdfx.rewrite(model, plan, optimizer=optimizer, masters=masters)
            wide_model = tdfx.rewrite(wide_model, plan, optimizer=other)
        assert set(masters) == set(model.parameters())
        assert set(optimizer.param_groups[0]["params"]) == set(masters.values())
        for master, expected in zip(masters_of(masters, model), wide_model.parameters(), strict=True):
            assert master.dtype == wide
            assert torch.equal(master, expected)
            states = optimizer.state[master], other.state[expected]
            assert states[0].keys() == states[1].keys() != set()
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        for parameter, master in masters.items():
            assert torch.equal(parameter, master.to(dtype)), "the model does not hold the rounded masters"
        assert all(master.grad is not None for master in masters.values()), "an accumulated gradient was lost"
        steps(optimizer, masters_of(masters, model), range(10 * number, 10 * number + 3))
        steps(other, wide_model.parameters(), range(10 * number, 10 * number + 3))
        copy_to_model(masters)
    assert list(model.state_dict()) == list(net().state_dict())
    assert type(model) is Net


@pytest.mark.parametrize(("dtype", "wide"), TYPES)
def test_at_full_rank_only_rounding_is_lost(dtype: torch.dtype, wide: torch.dtype) -> None:
    model, masters, reference = pair(dtype, wide)
    rounded = {name: dense(model, name).clone() for name in SITES}
    small = tdfx.rewrite(model, FULL, masters=masters)
    expected = reference(X.to(wide)).detach()
    # Two or three factors are rounded once each, and so are their sums of up to 200 terms.
    coarse, fine = 20 * torch.finfo(dtype).eps, 20 * torch.finfo(wide).eps
    for name in SITES:
        layer = cast("Factorized", small.get_submodule(name))
        assert relative_distance(joined(masters, layer), dense(reference, name)) < fine, name
        assert relative_distance(dense(small, name), rounded[name]) < coarse, name
        assert relative_distance(rounded[name], dense(reference, name)) > 50 * fine, (
            "the model's own weight has all digits"
        )
    assert relative_distance(small(X.to(dtype)).detach(), expected) < coarse
    merged = tdfx.merge(small, masters=masters)
    for name in SITES:
        master = masters[merged.get_parameter(name if name == "kernel" else f"{name}.weight")]
        assert relative_distance(master.detach(), dense(reference, name)) < fine
    half, masters, _ = pair(dtype, wide)
    low = tdfx.rewrite(half, HALF, masters=masters)
    assert relative_distance(low(X.to(dtype)).detach(), expected) > 5 * coarse, (
        "half of the ranks lose no more than rounding"
    )
    assert all(
        relative_distance(joined(masters, cast("Factorized", low.get_submodule(name))), rounded[name]) > 0.05
        for name in SITES
    )


def test_a_policy_gives_the_same_as_its_plan() -> None:
    results = []
    for planned in (True, False):
        model, masters, _ = pair()
        small = tdfx.rewrite(model, tdfx.plan(model, HALF) if planned else HALF, masters=masters)
        results.append(masters_of(masters, small))
    assert all(torch.equal(parameter, other) for parameter, other in zip(*results, strict=True))


@pytest.mark.parametrize("build", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_continues(build: Any, dtype: torch.dtype) -> None:
    model, masters, optimizer = trained(build, dtype=dtype)
    before = train(model, masters, optimizer, 5)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    after = train(small, masters, optimizer, 30)
    merged = tdfx.merge(small, optimizer=optimizer, masters=masters)
    after += train(merged, masters, optimizer, 3)
    assert max(after[-3:]) < 0.7 * min(before)


@pytest.mark.parametrize("kind", ["dict", "pairs", "lists", "plain tensors", "weak"])
def test_the_container_of_the_masters_is_updated_in_place(kind: str) -> None:
    model, masters, _ = pair()
    entries: list[tuple[nn.Parameter, Tensor]] = list(masters.items())
    if kind == "plain tensors":
        entries = [(parameter, master.detach().requires_grad_()) for parameter, master in entries]
    containers: dict[str, Any] = {
        "pairs": list(entries),
        "lists": ([parameter for parameter, _ in entries], [master for _, master in entries]),
        "weak": torch.utils.weak.WeakTensorKeyDictionary(dict(entries)),
    }
    container: Any = containers.get(kind, dict(entries))
    inner = container[0] if kind == "lists" else container

    def current() -> list[tuple[nn.Parameter, Tensor]]:
        if kind == "lists":
            return list(zip(*container, strict=True))
        return list(container) if kind == "pairs" else list(container.items())

    optimizer = SGD([master for _, master in entries], lr=0.1, momentum=0.9)
    steps(optimizer, [master for _, master in entries], range(2))
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=container)
    assert inner is (container[0] if kind == "lists" else container)
    assert {id(parameter) for parameter, _ in current()} == {id(parameter) for parameter in small.parameters()}
    assert [id(master) for _, master in current()] == [
        id(parameter) for parameter in optimizer.param_groups[0]["params"]
    ], "the masters are not in their order"
    kept = {id(parameter): id(master) for parameter, master in entries}
    shared = [(parameter, master) for parameter, master in current() if id(parameter) in kept]
    assert len(shared) == 5, "three biases, and the norm's scale and shift, are shared"
    assert all(kept[id(parameter)] == id(master) for parameter, master in shared)
    assert len({id(tensor) for pair in current() for tensor in pair}) == 2 * len(current())
    merged = tdfx.merge(small, optimizer=optimizer, masters=container)
    assert {id(parameter) for parameter, _ in current()} == {id(parameter) for parameter in merged.parameters()}
    assert [parameter.shape for parameter, _ in current()] == [parameter.shape for parameter, _ in entries]


def test_accumulated_gradients_of_model_and_masters_are_carried() -> None:
    model, masters, reference = pair(torch.float32, torch.float64)
    set_gradients(masters.values(), 1)
    set_gradients(reference.parameters(), 1)
    model(X).square().sum().backward()
    small = tdfx.rewrite(model, FULL, optimizer=sgd(masters.values()), masters=masters)
    wide_model = tdfx.rewrite(reference, tdfx.plan(model, FULL), optimizer=sgd(reference.parameters()))
    for master, expected in zip(masters_of(masters, small), wide_model.parameters(), strict=True):
        assert torch.equal(cast("Tensor", master.grad), cast("Tensor", expected.grad))
    wanted = torch.autograd.grad(small(X).square().sum(), list(small.parameters()))
    for parameter, gradient in zip(small.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert relative_distance(parameter.grad, gradient) < 1e-4


def test_a_model_without_gradients_gets_none() -> None:
    model, masters, _ = pair()
    small = tdfx.rewrite(model, HALF, masters=masters)
    assert all(tensor.grad is None for both in masters.items() for tensor in both)
    assert all(tensor.requires_grad for both in masters.items() for tensor in both)
    assert small.training


def test_the_model_and_its_masters_are_not_changed() -> None:
    model, masters, optimizer = trained()
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    old = dict(masters)
    wide = {parameter: master.detach().clone() for parameter, master in old.items()}
    tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(values[name], parameter) for name, parameter in model.named_parameters())
    assert all(torch.equal(wide[parameter], master) for parameter, master in old.items())


def test_averages_are_rewritten_and_merged_too() -> None:
    model, masters, optimizer = trained()
    average = AveragedModel(model)
    average.module.float()
    before = {name: dense(average.module, name).clone() for name in SITES}
    small = tdfx.rewrite(model, FULL, optimizer=optimizer, masters=masters, averaged=average)
    assert {parameter.dtype for parameter in average.module.parameters()} == {torch.float32}
    assert all(relative_distance(dense(average.module, name), before[name]) < 1e-5 for name in SITES)
    merged = tdfx.merge(small, optimizer=optimizer, masters=masters, averaged=average)
    assert list(average.module.state_dict()) == list(merged.state_dict())
    assert all(relative_distance(dense(average.module, name), before[name]) < 1e-5 for name in SITES)


def test_a_layer_in_full_precision_needs_no_master() -> None:
    model, masters, _ = pair()
    model.fc.float()
    wide = list(model.fc.parameters())
    for parameter in wide:
        del masters[parameter]
    optimizer = SGD([*masters.values(), *wide], lr=0.1, momentum=0.9)
    set_gradients([*masters.values(), *wide], 0)
    optimizer.step()
    expected = model.fc.weight.detach().clone()
    small = tdfx.rewrite(model, FULL, optimizer=optimizer, masters=masters)
    layer = cast("Factorized", small.get_submodule("fc"))
    assert not set(layer.weights) & set(masters)
    assert set(layer.weights) <= set(optimizer.param_groups[0]["params"])
    assert {weight.dtype for weight in layer.weights} == {torch.float32}
    assert all("momentum_buffer" in optimizer.state[weight] for weight in layer.weights)
    assert relative_distance(layer.weight.detach(), expected) < 1e-5


def test_a_parameter_may_be_its_own_master(tmp_path: Path) -> None:
    model, masters, _ = pair()
    model.fc.float()
    for parameter in model.fc.parameters():
        masters[parameter] = parameter
    optimizer = sgd(masters.values())
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    layer = cast("Factorized", small.get_submodule("fc"))
    assert all(masters[weight] is weight for weight in layer.weights)
    assert set(masters) == set(small.parameters())
    again, fresh, _ = pair()
    again.fc.float()
    for parameter in again.fc.parameters():
        fresh[parameter] = parameter
    tdfx.save(small, tmp_path / "run.tdfx", optimizer=optimizer, masters=masters)
    loaded = tdfx.load(tmp_path / "run.tdfx", again, optimizer=(other := sgd(fresh.values())), masters=fresh)
    assert all(fresh[parameter] is parameter for name, parameter in loaded.named_parameters() if name.startswith("fc."))
    assert set(fresh.values()) == set(other.param_groups[0]["params"])


def test_model_and_masters_keep_their_own_memory_formats() -> None:
    model, masters, _ = pair()
    model.to(memory_format=torch.channels_last)
    small = tdfx.rewrite(model, HALF, masters=masters)
    kernel = cast("Factorized", small.get_submodule("conv")).kernel_factor
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert masters[kernel].is_contiguous()
    merged = tdfx.merge(small, masters=masters)
    assert merged.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last)


def test_the_original_layer_is_remembered_in_the_models_dtype() -> None:
    model, masters, _ = pair()
    small = tdfx.rewrite(model, HALF, masters=masters)
    for layer in (module for module in small.modules() if isinstance(module, Factorized)):
        assert {parameter.dtype for parameter in layer.origin.layer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_switch_updates_the_masters(emit: Any) -> None:
    model: nn.Module
    model, masters, optimizer = trained()
    switch = tdfx.Switch(HALF, when=tdfx.AtStep(2))
    for _ in range(3):
        train(model, masters, optimizer, 1)
        model = switch.step(model, optimizer=optimizer, masters=masters, emit=emit)
    assert switch.done
    assert any(isinstance(module, Factorized) for module in model.modules())
    assert set(masters) == set(model.parameters())
    train(model, masters, optimizer, 1)


def test_factors_without_values_have_masters_too() -> None:
    model, masters, _ = pair()
    plan = tdfx.plan(model, HALF)
    small = tdfx.rewrite(model, plan, init="empty", optimizer=sgd(masters.values()), masters=masters)
    assert set(masters) == set(small.parameters())
    assert {master.dtype for master in masters.values()} == {torch.float32}


def test_a_saved_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    model, masters, optimizer = trained(adamw)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    train(small, masters, optimizer, 2)
    tdfx.save(small, tmp_path / "run.tdfx", optimizer=optimizer, masters=masters)
    fresh, others, _ = pair()
    other = adamw(others.values())
    loaded = tdfx.load(tmp_path / "run.tdfx", fresh, optimizer=other, masters=others)
    assert set(others) == set(loaded.parameters())
    for master, expected in zip(masters_of(others, loaded), masters_of(masters, small), strict=True):
        assert torch.equal(master, expected)
        assert master.dtype == expected.dtype
        assert torch.equal(other.state[master]["exp_avg_sq"], optimizer.state[expected]["exp_avg_sq"])
    assert train(small, masters, optimizer, 3) == train(loaded, others, other, 3)
    pairs = zip(masters_of(others, loaded), masters_of(masters, small), strict=True)
    assert all(torch.equal(master, expected) for master, expected in pairs)
    model_only = tdfx.load(tmp_path / "run.tdfx", net)
    assert {parameter.dtype for parameter in model_only.parameters()} == {torch.bfloat16}


def test_loading_with_other_masters_changes_nothing(tmp_path: Path) -> None:
    model, masters, optimizer = trained()
    tdfx.save(model, tmp_path / "run.tdfx", optimizer=optimizer, masters=masters)
    fresh, others, _ = pair()
    del others[fresh.norm.bias]
    other = sgd([*others.values(), fresh.norm.bias])
    before = dict(others), list(other.param_groups[0]["params"])
    with pytest.raises(
        tdfx.CheckpointError,
        match=r"masters of 9 of .* and 8 were passed: 'norm\.bias' has a master only in the checkpoint",
    ):
        tdfx.load(tmp_path / "run.tdfx", fresh, optimizer=other, masters=others)
    with pytest.raises(tdfx.CheckpointError, match=r"and 0 were passed: .* has a master only in the checkpoint"):
        tdfx.load(tmp_path / "run.tdfx", fresh, optimizer=other)
    assert before[0] == others
    assert all(a is b for a, b in zip(before[1], other.param_groups[0]["params"], strict=True))
    with pytest.raises(tdfx.CheckpointError, match="and masters= if it trains wider copies"):
        tdfx.save(model, tmp_path / "other.tdfx", optimizer=optimizer)


def wrong_masters(fault: str, model: Net, masters: Masters) -> Any:
    entries: list[Any] = list(masters.items())
    weight = model.get_parameter("conv.weight")
    match fault:
        case "missing":
            return {parameter: master for parameter, master in entries if parameter is model.conv.bias}
        case "shape":
            return {**masters, weight: nn.Parameter(torch.zeros(3))}
        case "no tensor":
            return {**masters, weight: 1.0}
        case "coarse":
            model.float()
            return {parameter: master.bfloat16() for parameter, master in entries}
        case "device":
            return {**masters, weight: nn.Parameter(torch.empty_like(masters[weight], device="meta"))}
        case "reversed":
            return [(master, parameter) for parameter, master in entries]
        case "twice":
            return [*entries, entries[0]]
        case "uneven":
            return [parameter for parameter, _ in entries], [torch.zeros(100)]
        case "not held":
            return {parameter: nn.Parameter(master.detach().clone()) for parameter, master in entries}
        case "nan":
            masters[weight].detach().view(-1)[0] = float("nan")
            return masters
    return zip(*entries, strict=True)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (
            "missing",
            OptimizerError,
            r"no master of the weight of site 'kernel', and no optimizer .*exclude=\('kernel',\)",
        ),
        ("shape", OptimizerError, r"master of 'conv\.weight' has shape \(3,\), and the parameter has \(12, 4, 3, 3\)"),
        (
            "no tensor",
            OptimizerError,
            r"master of 'conv\.weight', a torch\.bfloat16 tensor of .* is a float: both must",
        ),
        ("coarse", OptimizerError, r"is torch\.bfloat16, coarser than the parameter's torch\.float32"),
        ("device", OptimizerError, r"master of 'conv\.weight' is on meta, and the parameter on cpu"),
        ("reversed", OptimizerError, r"Entry 0 of masters= is for a torch\.float32 tensor .* no parameter of this Net"),
        ("twice", OptimizerError, r"has one parameter in two entries, for 'kernel' and for 'kernel'"),
        ("uneven", OptimizerError, r"lists of 9 parameters and 1 masters: .* One flat master"),
        ("not held", OptimizerError, r"master of the weight of site 'kernel' is in none of the optimizers given"),
        ("nan", tdfx.WeightError, r"site 'conv' has 1 values that are NaN"),
        ("other", OptimizerError, r"masters= is a zip, which tdfx cannot update in place"),
    ],
)
def test_masters_that_do_not_match_the_model_change_nothing(fault: str, kind: Any, message: str) -> None:
    model, masters, optimizer = trained()
    wrong = wrong_masters(fault, model, masters)
    before = list(wrong.items()) if isinstance(wrong, dict) else None
    parameters = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    states = {id(parameter) for parameter in optimizer.state}
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(kind, match=message):
        tdfx.rewrite(model, HALF, optimizer=optimizer, masters=wrong)
    assert parameters == [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert states == {id(parameter) for parameter in optimizer.state}
    assert names == {name: id(parameter) for name, parameter in model.named_parameters()}
    if before is not None:
        pairs = zip(before, wrong.items(), strict=True)
        assert all(old[0] is new[0] and old[1] is new[1] for old, new in pairs)


def test_one_master_for_two_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).bfloat16()
    shared = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(OptimizerError, match=r"has one master in two entries, for '0\.weight' and for '1\.weight'"):
        tdfx.rewrite(model, HALF, masters=dict.fromkeys(model.parameters(), shared))


def test_an_optimizer_of_masters_without_masters_is_refused() -> None:
    model, _, optimizer = trained()
    with pytest.raises(OptimizerError, match=r"If it holds wider copies of them, .* pass these too: masters="):
        tdfx.rewrite(model, HALF, optimizer=optimizer)


def test_a_merge_needs_the_masters_of_all_factors() -> None:
    model, masters, optimizer = trained()
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    first = cast("Factorized", small.get_submodule("conv")).weights[0]
    incomplete = {parameter: master for parameter, master in masters.items() if parameter is not first}
    with pytest.raises(OptimizerError, match="no master of the weight of site 'conv'"):
        tdfx.merge(small, optimizer=optimizer, masters=incomplete)
    with pytest.raises(OptimizerError, match=r"Entry \d of masters= .* no parameter of this Net"):
        tdfx.merge(small, optimizer=optimizer, masters=dict(zip(model.parameters(), masters.values(), strict=False)))
    assert set(masters) == set(small.parameters())


def test_decay_and_penalty_refuse_an_optimizer_of_masters() -> None:
    model, masters, optimizer = trained()
    with pytest.raises(
        OptimizerError, match="holds none of the 4 weights of the plan: it trains another model, or wider"
    ):
        tdfx.LowRankPenalty(model, tdfx.plan(model, HALF), optimizer)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    with pytest.raises(
        OptimizerError, match=r"holds none of the factors of this .*Net: it trains another model, or wider"
    ):
        tdfx.FrobeniusDecay(small, optimizer)

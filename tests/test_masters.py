"""Models of half precision whose optimizer trains wider copies of their parameters."""

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
    """A convolution, a grouped transposed one, a layer that stays, a linear layer, and a parameter that a function takes."""

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
    """Return a model, its masters with digits that the model lacks, and a wide model of the masters' values."""
    reference = net().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in reference.parameters():
            one.add_(torch.randn(one.shape, generator=generator, dtype=torch.float64), alpha=1e-3)
    reference.to(wide)
    model = copy.deepcopy(reference).to(dtype)
    others = zip(model.parameters(), reference.parameters(), strict=True)
    return model, {one: nn.Parameter(value.detach().clone()) for one, value in others}, reference


def push(parameters: Iterable[Tensor], seed: int) -> None:
    """Give parameters gradients that only depend on their shapes and their order."""
    generator = torch.Generator().manual_seed(seed)
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=generator).to(one.dtype)


def steps(optimizer: Optimizer, parameters: Iterable[Tensor], seeds: Iterable[int]) -> None:
    held = list(parameters)
    for seed in seeds:
        push(held, seed)
        optimizer.step()


def settle(masters: Masters) -> None:
    """Copy masters into the model, as a loop does after each step."""
    with torch.no_grad():
        for one, master in masters.items():
            one.copy_(master)


def train(model: nn.Module, masters: Masters, optimizer: Optimizer, count: int) -> list[float]:
    losses = []
    dtype = next(iter(masters)).dtype
    target = torch.arange(16) % 10
    for _ in range(count):
        loss = F.cross_entropy(model(X.to(dtype)).float(), target)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for one, master in masters.items():
            master.grad = None if one.grad is None else one.grad.to(master.dtype)
        optimizer.step()
        settle(masters)
        losses.append(float(loss.detach()))
    return losses


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.02, momentum=0.9)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=3e-3)


def trained(make: Any = sgd, **types: torch.dtype) -> tuple[Net, Masters, Optimizer]:
    model, masters, _ = pair(**types)
    optimizer = make(masters.values())
    train(model, masters, optimizer, 3)
    return model, masters, optimizer


def of(masters: Masters, model: nn.Module) -> list[nn.Parameter]:
    """Return the masters in the order of the model's parameters, of which each has one."""
    return [masters[one] for one in model.parameters()]


def dense(model: nn.Module, name: str) -> Tensor:
    found: Any = model.get_parameter(name) if name == "kernel" and "kernel" in model._parameters else None
    return cast("Tensor", model.get_submodule(name).weight if found is None else found).detach()


def far(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def joined(masters: Masters, layer: Factorized) -> Tensor:
    return layer.kind.from_dense(layer.join(*(masters[one].detach().double() for one in layer.weights)))


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize(("dtype", "wide"), TYPES)
def test_the_masters_run_is_the_bits_of_the_wide_models(make: Any, dtype: torch.dtype, wide: torch.dtype) -> None:
    model: nn.Module
    model, masters, reference = pair(dtype, wide)
    optimizer, other = make(masters.values()), make(reference.parameters())
    there: nn.Module = reference
    steps(optimizer, masters.values(), range(3))
    steps(other, there.parameters(), range(3))
    settle(masters)
    for number, policy in enumerate((HALF, QUARTER, None)):
        if policy is None:
            model = tdfx.merge(model, optimizer=optimizer, masters=masters)
            there = tdfx.merge(there, optimizer=other)
        else:
            wish = tdfx.plan(model, policy)
            model = tdfx.rewrite(model, wish, optimizer=optimizer, masters=masters)
            there = tdfx.rewrite(there, wish, optimizer=other)
        assert set(masters) == set(model.parameters())
        assert set(optimizer.param_groups[0]["params"]) == set(masters.values())
        for mine, theirs in zip(of(masters, model), there.parameters(), strict=True):
            assert mine.dtype == wide
            assert torch.equal(mine, theirs)
            states = optimizer.state[mine], other.state[theirs]
            assert states[0].keys() == states[1].keys() != set()
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        assert {one.dtype for one in model.parameters()} == {dtype}
        for one, master in masters.items():
            assert torch.equal(one, master.to(dtype)), "the model holds the rounded masters"
        assert all(one.grad is not None for one in masters.values()), "gradients that wait are carried"
        steps(optimizer, of(masters, model), range(10 * number, 10 * number + 3))
        steps(other, there.parameters(), range(10 * number, 10 * number + 3))
        settle(masters)
    assert list(model.state_dict()) == list(net().state_dict())
    assert type(model) is Net


@pytest.mark.parametrize(("dtype", "wide"), TYPES)
def test_at_full_rank_nothing_is_lost_but_rounding(dtype: torch.dtype, wide: torch.dtype) -> None:
    model, masters, reference = pair(dtype, wide)
    settled = {name: dense(model, name).clone() for name in SITES}
    small = tdfx.rewrite(model, FULL, masters=masters)
    expected = reference(X.to(wide)).detach()
    # Two or three factors, each rounded once, whose sums of up to 200 terms are rounded too.
    coarse, fine = 20 * torch.finfo(dtype).eps, 20 * torch.finfo(wide).eps
    for name in SITES:
        layer = cast("Factorized", small.get_submodule(name))
        assert far(joined(masters, layer), dense(reference, name)) < fine, name
        assert far(dense(small, name), settled[name]) < coarse, name
        assert far(settled[name], dense(reference, name)) > 50 * fine, "the model's own weight lacks those digits"
    assert far(small(X.to(dtype)).detach(), expected) < coarse
    back = tdfx.merge(small, masters=masters)
    for name in SITES:
        master = masters[back.get_parameter(name if name == "kernel" else f"{name}.weight")]
        assert far(master.detach(), dense(reference, name)) < fine
    half, masters, _ = pair(dtype, wide)
    low = tdfx.rewrite(half, HALF, masters=masters)
    assert far(low(X.to(dtype)).detach(), expected) > 5 * coarse, "half of the ranks lose more than rounding does"
    assert all(
        far(joined(masters, cast("Factorized", low.get_submodule(name))), settled[name]) > 0.05 for name in SITES
    )


def test_a_policy_gives_what_its_plan_would() -> None:
    found = []
    for planned in (True, False):
        model, masters, _ = pair()
        small = tdfx.rewrite(model, tdfx.plan(model, HALF) if planned else HALF, masters=masters)
        found.append(of(masters, small))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_goes_on(make: Any, dtype: torch.dtype) -> None:
    model, masters, optimizer = trained(make, dtype=dtype)
    before = train(model, masters, optimizer, 5)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    after = train(small, masters, optimizer, 30)
    back = tdfx.merge(small, optimizer=optimizer, masters=masters)
    after += train(back, masters, optimizer, 3)
    assert max(after[-3:]) < 0.7 * min(before)


@pytest.mark.parametrize("kind", ["dict", "pairs", "lists", "plain tensors", "weak"])
def test_the_container_is_brought_up_to_date_in_place(kind: str) -> None:
    model, masters, _ = pair()
    entries: list[tuple[nn.Parameter, Tensor]] = list(masters.items())
    if kind == "plain tensors":
        entries = [(one, master.detach().requires_grad_()) for one, master in entries]
    made: dict[str, Any] = {
        "pairs": list(entries),
        "lists": ([one for one, _ in entries], [one for _, one in entries]),
        "weak": torch.utils.weak.WeakTensorKeyDictionary(dict(entries)),
    }
    held: Any = made.get(kind, dict(entries))
    inside = held[0] if kind == "lists" else held

    def now() -> list[tuple[nn.Parameter, Tensor]]:
        if kind == "lists":
            return list(zip(*held, strict=True))
        return list(held) if kind == "pairs" else list(held.items())

    optimizer = SGD([master for _, master in entries], lr=0.1, momentum=0.9)
    steps(optimizer, [master for _, master in entries], range(2))
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=held)
    assert inside is (held[0] if kind == "lists" else held)
    assert {id(one) for one, _ in now()} == {id(one) for one in small.parameters()}
    assert [id(one) for _, one in now()] == [id(one) for one in optimizer.param_groups[0]["params"]], "in their order"
    kept = {id(one): id(master) for one, master in entries}
    shared = [(one, master) for one, master in now() if id(one) in kept]
    assert len(shared) == 5, "three biases, and the norm's scale and shift"
    assert all(kept[id(one)] == id(master) for one, master in shared)
    assert len({id(one) for pair in now() for one in pair}) == 2 * len(now())
    back = tdfx.merge(small, optimizer=optimizer, masters=held)
    assert {id(one) for one, _ in now()} == {id(one) for one in back.parameters()}
    assert [one.shape for one, _ in now()] == [one.shape for one, _ in entries]


def test_gradients_that_wait_are_carried_in_both() -> None:
    model, masters, reference = pair(torch.float32, torch.float64)
    push(masters.values(), 1)
    push(reference.parameters(), 1)
    model(X).square().sum().backward()
    small = tdfx.rewrite(model, FULL, optimizer=sgd(masters.values()), masters=masters)
    there = tdfx.rewrite(reference, tdfx.plan(model, FULL), optimizer=sgd(reference.parameters()))
    for mine, theirs in zip(of(masters, small), there.parameters(), strict=True):
        assert torch.equal(cast("Tensor", mine.grad), cast("Tensor", theirs.grad))
    wanted = torch.autograd.grad(small(X).square().sum(), list(small.parameters()))
    for one, gradient in zip(small.parameters(), wanted, strict=True):
        assert one.grad is not None
        assert one.grad.dtype == torch.float32
        assert far(one.grad, gradient) < 1e-4


def test_a_model_without_gradients_gets_none() -> None:
    model, masters, _ = pair()
    small = tdfx.rewrite(model, HALF, masters=masters)
    assert all(one.grad is None for both in masters.items() for one in both)
    assert all(one.requires_grad for both in masters.items() for one in both)
    assert small.training


def test_the_model_and_its_masters_are_left_as_they_were() -> None:
    model, masters, optimizer = trained()
    before = dict(model.named_parameters())
    values = {name: one.detach().clone() for name, one in before.items()}
    old = dict(masters)
    wide = {one: master.detach().clone() for one, master in old.items()}
    tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    assert all(before[name] is one for name, one in model.named_parameters())
    assert all(torch.equal(values[name], one) for name, one in model.named_parameters())
    assert all(torch.equal(wide[one], master) for one, master in old.items())


def test_averages_go_along() -> None:
    model, masters, optimizer = trained()
    average = AveragedModel(model)
    average.module.float()
    before = {name: dense(average.module, name).clone() for name in SITES}
    small = tdfx.rewrite(model, FULL, optimizer=optimizer, masters=masters, averaged=average)
    assert {one.dtype for one in average.module.parameters()} == {torch.float32}
    assert all(far(dense(average.module, name), before[name]) < 1e-5 for name in SITES)
    back = tdfx.merge(small, optimizer=optimizer, masters=masters, averaged=average)
    assert list(average.module.state_dict()) == list(back.state_dict())
    assert all(far(dense(average.module, name), before[name]) < 1e-5 for name in SITES)


def test_a_layer_that_is_kept_in_full_precision_needs_no_master() -> None:
    model, masters, _ = pair()
    model.fc.float()
    wide = list(model.fc.parameters())
    for one in wide:
        del masters[one]
    optimizer = SGD([*masters.values(), *wide], lr=0.1, momentum=0.9)
    push([*masters.values(), *wide], 0)
    optimizer.step()
    expected = model.fc.weight.detach().clone()
    small = tdfx.rewrite(model, FULL, optimizer=optimizer, masters=masters)
    layer = cast("Factorized", small.get_submodule("fc"))
    assert not set(layer.weights) & set(masters)
    assert set(layer.weights) <= set(optimizer.param_groups[0]["params"])
    assert {one.dtype for one in layer.weights} == {torch.float32}
    assert all("momentum_buffer" in optimizer.state[one] for one in layer.weights)
    assert far(layer.weight.detach(), expected) < 1e-5


def test_a_parameter_may_be_its_own_master(tmp_path: Path) -> None:
    model, masters, _ = pair()
    model.fc.float()
    for one in model.fc.parameters():
        masters[one] = one
    optimizer = sgd(masters.values())
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    layer = cast("Factorized", small.get_submodule("fc"))
    assert all(masters[one] is one for one in layer.weights)
    assert set(masters) == set(small.parameters())
    again, fresh, _ = pair()
    again.fc.float()
    for one in again.fc.parameters():
        fresh[one] = one
    tdfx.save(small, tmp_path / "run.tdfx", optimizer=optimizer, masters=masters)
    loaded = tdfx.load(tmp_path / "run.tdfx", again, optimizer=(other := sgd(fresh.values())), masters=fresh)
    assert all(fresh[one] is one for name, one in loaded.named_parameters() if name.startswith("fc."))
    assert set(fresh.values()) == set(other.param_groups[0]["params"])


def test_channels_last_goes_to_the_model_and_to_the_masters_by_themselves() -> None:
    model, masters, _ = pair()
    model.to(memory_format=torch.channels_last)
    small = tdfx.rewrite(model, HALF, masters=masters)
    kernel = cast("Factorized", small.get_submodule("conv")).kernel_factor
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert masters[kernel].is_contiguous()
    back = tdfx.merge(small, masters=masters)
    assert back.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last)


def test_what_the_original_was_is_said_in_the_models_type() -> None:
    model, masters, _ = pair()
    small = tdfx.rewrite(model, HALF, masters=masters)
    for layer in (one for one in small.modules() if isinstance(one, Factorized)):
        assert {one.dtype for one in layer.origin.layer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_switch_takes_them_along(emit: Any) -> None:
    model: nn.Module
    model, masters, optimizer = trained()
    switch = tdfx.Switch(HALF, when=tdfx.AtStep(2))
    for _ in range(3):
        train(model, masters, optimizer, 1)
        model = switch.step(model, optimizer=optimizer, masters=masters, emit=emit)
    assert switch.done
    assert any(isinstance(one, Factorized) for one in model.modules())
    assert set(masters) == set(model.parameters())
    train(model, masters, optimizer, 1)


def test_factors_without_values_have_masters_too() -> None:
    model, masters, _ = pair()
    made = tdfx.plan(model, HALF)
    small = tdfx.rewrite(model, made, init="empty", optimizer=sgd(masters.values()), masters=masters)
    assert set(masters) == set(small.parameters())
    assert {one.dtype for one in masters.values()} == {torch.float32}


def test_a_run_is_saved_and_loaded_to_the_same_bits(tmp_path: Path) -> None:
    model, masters, optimizer = trained(adamw)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    train(small, masters, optimizer, 2)
    tdfx.save(small, tmp_path / "run.tdfx", optimizer=optimizer, masters=masters)
    fresh, others, _ = pair()
    other = adamw(others.values())
    held = others
    again = tdfx.load(tmp_path / "run.tdfx", fresh, optimizer=other, masters=others)
    assert others is held
    assert set(others) == set(again.parameters())
    for mine, theirs in zip(of(masters, small), of(others, again), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
        assert torch.equal(optimizer.state[mine]["exp_avg_sq"], other.state[theirs]["exp_avg_sq"])
    assert train(small, masters, optimizer, 3) == train(again, others, other, 3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(of(masters, small), of(others, again), strict=True))
    alone = tdfx.load(tmp_path / "run.tdfx", net)
    assert {one.dtype for one in alone.parameters()} == {torch.bfloat16}


def test_other_masters_than_those_that_were_saved_change_nothing(tmp_path: Path) -> None:
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
    assert all(one is two for one, two in zip(before[1], other.param_groups[0]["params"], strict=True))
    with pytest.raises(tdfx.CheckpointError, match="and masters= if it trains wider copies"):
        tdfx.save(model, tmp_path / "other.tdfx", optimizer=optimizer)


def spoiled(what: str, model: Net, masters: Masters) -> Any:
    entries: list[Any] = list(masters.items())
    weight = model.get_parameter("conv.weight")
    match what:
        case "missing":
            return {one: master for one, master in entries if one is model.conv.bias}
        case "shape":
            return {**masters, weight: nn.Parameter(torch.zeros(3))}
        case "no tensor":
            return {**masters, weight: 1.0}
        case "coarse":
            model.float()
            return {one: master.bfloat16() for one, master in entries}
        case "device":
            return {**masters, weight: nn.Parameter(torch.empty_like(masters[weight], device="meta"))}
        case "reversed":
            return [(master, one) for one, master in entries]
        case "twice":
            return [*entries, entries[0]]
        case "uneven":
            return [one for one, _ in entries], [torch.zeros(100)]
        case "not held":
            return {one: nn.Parameter(master.detach().clone()) for one, master in entries}
        case "nan":
            masters[weight].detach().view(-1)[0] = float("nan")
            return masters
    return zip(*entries, strict=True)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
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
        ("other", OptimizerError, r"masters= is a zip, and what is kept in it could not be brought up to date"),
    ],
)
def test_masters_that_do_not_go_with_the_model_change_nothing(what: str, kind: Any, message: str) -> None:
    model, masters, optimizer = trained()
    held = spoiled(what, model, masters)
    before = list(held.items()) if isinstance(held, dict) else None
    parameters = [id(one) for one in optimizer.param_groups[0]["params"]]
    states = {id(one) for one in optimizer.state}
    names = {name: id(one) for name, one in model.named_parameters()}
    with pytest.raises(kind, match=message):
        tdfx.rewrite(model, HALF, optimizer=optimizer, masters=held)
    assert parameters == [id(one) for one in optimizer.param_groups[0]["params"]]
    assert states == {id(one) for one in optimizer.state}
    assert names == {name: id(one) for name, one in model.named_parameters()}
    if before is not None:
        assert all(one[0] is two[0] and one[1] is two[1] for one, two in zip(before, held.items(), strict=True))


def test_one_master_for_two_parameters_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).bfloat16()
    shared = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(OptimizerError, match=r"has one master in two entries, for '0\.weight' and for '1\.weight'"):
        tdfx.rewrite(model, HALF, masters=dict.fromkeys(model.parameters(), shared))


def test_masters_that_were_not_passed_are_asked_for() -> None:
    model, _, optimizer = trained()
    with pytest.raises(OptimizerError, match=r"If it holds wider copies of them, .* pass these too: masters="):
        tdfx.rewrite(model, HALF, optimizer=optimizer)


def test_a_merge_needs_the_masters_of_all_factors() -> None:
    model, masters, optimizer = trained()
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, masters=masters)
    first = cast("Factorized", small.get_submodule("conv")).weights[0]
    lacking = {one: master for one, master in masters.items() if one is not first}
    with pytest.raises(OptimizerError, match="no master of the weight of site 'conv'"):
        tdfx.merge(small, optimizer=optimizer, masters=lacking)
    with pytest.raises(OptimizerError, match=r"Entry \d of masters= .* no parameter of this Net"):
        tdfx.merge(small, optimizer=optimizer, masters=dict(zip(model.parameters(), masters.values(), strict=False)))
    assert set(masters) == set(small.parameters())


def test_decay_and_penalty_of_the_models_own_parameters_say_that_they_would_do_nothing() -> None:
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

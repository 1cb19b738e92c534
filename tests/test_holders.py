"""What else holds a parameter that goes, as inner optimizers, lists and hooks do: it follows, or is refused by its name."""

from __future__ import annotations

import copy
import re
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.weak import WeakTensorKeyDictionary

import tdfx
from tdfx.layers.holders import search, share_memory
from tdfx.optim.inner import families, with_inner
from tdfx.wrappers.in_place import InPlaceModule

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
EMITS: tuple[tdfx.Emit, ...] = ("graph", "modules")
every_emit = pytest.mark.parametrize("emit", EMITS)


def batch() -> Tensor:
    return torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).double()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(batch()).square().mean().backward()
    optimizer.step()


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def held(*things: Any) -> list[Any]:
    """Return the identity and the values of all that models and optimizers hold."""
    state: list[Any] = []
    for thing in things:
        if isinstance(thing, nn.Module):
            state += [(name, id(tensor), tensor.tolist()) for name, tensor in thing.named_parameters()]
        else:
            state += [
                (id(parameter), parameter.tolist()) for group in thing.param_groups for parameter in group["params"]
            ]
            state += [(id(key), sorted(entry)) for key, entry in thing.state.items()]
    return state


def check_refused(act: Callable[[], Any], error: type[Exception], text: str, *things: Any) -> None:
    """Fail unless an error with this text is raised, and nothing has changed then."""
    before = held(*things)
    with pytest.raises(error, match=text):
        act()
    assert held(*things) == before


class Lookahead(Optimizer):
    """Shares its groups with the optimizer inside; keeps slow weights of its own, from the third step on."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.count = inner, 0
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        if self.count % 3 == 0:
            for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


class DeclaredLookahead(Lookahead):
    """The same, with slow weights that tdfx can carry."""


tdfx.register_optimizer(DeclaredLookahead, slow="iterate")


class Proxy(Optimizer):
    """Has the groups and the state of the optimizer inside."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner
        self._zero_grad_profile_name = ""

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


class Chained(Optimizer):
    """Steps two optimizers, each of which has groups of its own."""

    def __init__(self, *inner: Optimizer) -> None:
        groups = [group for each in inner for group in each.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.inside = {"all": list(inner)}
        self.param_groups = groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.inside["all"]:
            each.step()


def chained(model: nn.Module) -> Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return Chained(SGD(matrices, lr=0.1, momentum=0.9), AdamW(rest, lr=1e-2))


WRAPPERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "lookahead": lambda model: DeclaredLookahead(sgd(model)),
    "proxy": lambda model: Proxy(sgd(model)),
    "proxy of a proxy": lambda model: Proxy(Proxy(sgd(model))),
    "chained": chained,
}


@pytest.mark.parametrize("build", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_optimizers_inside_optimizers_go_along(build: Callable[[nn.Module], Optimizer]) -> None:
    model = mlp()
    optimizer = build(model)
    for _ in range(4):
        step(model, optimizer)
    actions: tuple[Callable[[nn.Module], nn.Module], ...] = (
        lambda net: tdfx.rewrite(net, FULL, optimizer=optimizer),
        lambda net: tdfx.merge(net, optimizer=optimizer),
    )
    for act in actions:
        model = cast("nn.Sequential", act(model))
        parameters = {id(parameter) for parameter in model.parameters()}
        carried: set[int] = set()
        for each in with_inner([optimizer]):
            assert {id(parameter) for group in each.param_groups for parameter in group["params"]} <= parameters
            assert set(map(id, each.state)) <= parameters
            carried |= set(map(id, each.state))
        assert carried == parameters, "some state was lost"
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step(model, optimizer)
        assert not any(map(torch.equal, before, model.parameters())), "some parameters do not move"


class WithOwnGroups(Optimizer):
    """Holds the parameters of the optimizer inside in groups of its own."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([parameter for group in inner.param_groups for parameter in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


EARLIER = {**WRAPPERS, "own groups": lambda model: WithOwnGroups(sgd(model))}


@pytest.mark.parametrize("build", EARLIER.values(), ids=EARLIER.keys())
def test_a_checkpoint_without_the_optimizers_inside_is_loaded(build: Callable[[nn.Module], Optimizer]) -> None:
    model, other = mlp(), mlp()
    optimizer, loading = build(model), build(other)
    model = cast("nn.Sequential", tdfx.rewrite(model, HALF, optimizer=optimizer))
    for _ in range(4):
        step(model, optimizer)
    record = tdfx.state(model, optimizer=optimizer)
    record["optimizers"] = record["optimizers"][:1]  # as earlier versions saved it
    loaded = tdfx.load(record, other, optimizer=loading)
    parameters = list(loaded.parameters())
    for each in with_inner([loading]):
        held_now = {id(parameter) for group in each.param_groups for parameter in group["params"]}
        assert held_now <= set(map(id, parameters))
        assert set(map(id, each.state)) <= held_now
    for parameter, saved in zip(parameters, model.parameters(), strict=True):
        assert loading.state.get(parameter, {}).keys() == optimizer.state.get(saved, {}).keys()
    before = [parameter.detach().clone() for parameter in parameters]
    step(loaded, loading)
    assert not any(map(torch.equal, before, parameters)), "some parameters do not move"
    third, unused = mlp(), tdfx.state(model, optimizer=optimizer)
    unused["optimizers"] *= 4
    with pytest.raises(
        tdfx.CheckpointError, match=r"optimizers, and 1 were passed, with \d more inside\. Pass as many"
    ):
        tdfx.load(unused, third, optimizer=build(third))


def test_a_wrapped_optimizer_carries_what_the_plain_one_does() -> None:
    plain, wrapped = mlp(), mlp()
    optimizer, wrapper = sgd(plain), Proxy(sgd(wrapped))
    for _ in range(3):
        step(plain, optimizer)
        step(wrapped, wrapper)
    results = [tdfx.rewrite(plain, HALF, optimizer=optimizer), tdfx.rewrite(wrapped, HALF, optimizer=wrapper)]
    for each, net in ((optimizer, results[0]), (wrapper, results[1])):
        for _ in range(2):
            step(net, each)
    assert all(map(torch.equal, results[0].state_dict().values(), results[1].state_dict().values()))


def test_the_state_of_an_outer_optimizer_is_declared_or_refused() -> None:
    model = mlp()
    optimizer = Lookahead(sgd(model))
    for _ in range(3):
        step(model, optimizer)
    text = (
        r"Lookahead is an optimizer around SGD, .*site '0'.*\(slow\).*register_optimizer\(Lookahead, slow='iterate'\)"
    )
    check_refused(
        lambda: tdfx.rewrite(model, HALF, optimizer=optimizer),
        tdfx.OptimizerError,
        text,
        model,
        optimizer,
        optimizer.inner,
    )


def test_a_parameter_of_two_optimizers_that_do_not_belong_together_is_refused() -> None:
    model = mlp()
    optimizers: list[Optimizer] = [sgd(model), Proxy(sgd(model))]
    check_refused(
        lambda: tdfx.rewrite(model, HALF, optimizer=optimizers),
        tdfx.OptimizerError,
        "held by 2 of the optimizers given",
        model,
        *optimizers,
    )
    assert [len(family) for family in families(with_inner(optimizers))] == [1, 2]
    tdfx.rewrite(model, HALF, optimizer=[optimizers[1], cast("Proxy", optimizers[1]).optimizer])  # one family


def own_list(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.mine = {"x": [list(model.parameters())]}
    return cast("Optimizer", optimizer)


def own_keys(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.scales = dict.fromkeys(model.parameters(), 1.0)
    return cast("Optimizer", optimizer)


def own_ids(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.names = {id(parameter): name for name, parameter in model.named_parameters()}
    return cast("Optimizer", optimizer)


def own_views(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.views = tuple(parameter.data.view(-1) for parameter in model.parameters())
    return cast("Optimizer", optimizer)


def own_copies(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.slow = [parameter.detach().clone() for parameter in model.parameters()]
    return cast("Optimizer", optimizer)


def flat_buffer(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.flat = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    return cast("Optimizer", optimizer)


class Average:
    """Keeps copies by name."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def own_average(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.average = Average(model)
    return cast("Optimizer", optimizer)


def step_hook(model: nn.Module) -> Optimizer:
    optimizer, parameters = sgd(model), list(model.parameters())

    def clamp(*_: Any) -> None:
        for parameter in parameters:
            parameter.data.clamp_(-1, 1)

    optimizer.register_step_post_hook(clamp)
    return optimizer


class Slotted(SGD):
    __slots__ = ("mine",)
    mine: Any


def own_slot(model: nn.Module) -> Optimizer:
    optimizer = Slotted(model.parameters(), lr=0.1)
    optimizer.mine = types.MappingProxyType({"first": next(model.parameters())})
    return optimizer


def own_model(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.read = model.parameters
    return cast("Optimizer", optimizer)


def own_module_list(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.mine = [nn.ParameterList(model.parameters())]
    return cast("Optimizer", optimizer)


def own_weak_keys(model: nn.Module) -> Optimizer:
    optimizer: Any = sgd(model)
    optimizer.scales = WeakTensorKeyDictionary(dict.fromkeys(model.parameters(), 1.0))
    return cast("Optimizer", optimizer)


def own_group_entry(model: nn.Module) -> Optimizer:
    optimizer = sgd(model)
    optimizer.param_groups[0]["slow"] = [parameter.detach().clone() for parameter in model.parameters()]
    return optimizer


def own_state(model: nn.Module) -> Optimizer:
    optimizer = sgd(model)
    cast("Any", optimizer.state)["all"] = {"trained": list(model.parameters())}
    return optimizer


def own_entries(model: nn.Module) -> Optimizer:
    optimizer = sgd(model)
    optimizer.param_groups[0]["scales"] = [1.0] * len(list(model.parameters()))
    return optimizer


def schedule(model: nn.Module) -> Optimizer:
    optimizer, weight = sgd(model), cast("Any", model)[0].weight.detach()
    cast("Any", optimizer).schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: float(weight.norm()))
    return optimizer


HOLDING: dict[str, tuple[Callable[[nn.Module], Optimizer], str]] = {
    "list": (own_list, r"SGD holds the weight of site '0' in mine\['x'\]\[0\]\[0\] too"),
    "keys": (own_keys, "SGD holds the weight of site '0' in a key of scales too"),
    "ids": (own_ids, "SGD refers to the weight of site '0' by its id, in a key of names"),
    "views": (own_views, r"SGD holds the weight of site '0' in views\[0\] too"),
    "copies": (own_copies, r"SGD holds a tensor of the shape of the weight of site '0' in slow\[0\]"),
    "average": (own_average, r"SGD holds a tensor of the shape of .*'0' in average.shadow\['0.weight'\]"),
    "flat": (flat_buffer, "SGD holds one flat tensor for all its parameters in flat"),
    "slot": (own_slot, r"Slotted holds the weight of site '0' in mine\['first'\] too"),
    "model": (own_model, "SGD refers to a Sequential with the weight of site '0' in the object of read, which another"),
    "module": (own_module_list, r"SGD refers to a ParameterList with the weight of site '0' in mine\[0\]"),
    "weak keys": (own_weak_keys, "SGD holds the weight of site '0' in a key of scales too"),
    "group": (own_group_entry, r"SGD holds a tensor of the shape of .*'0' in param_groups\[0\]\['slow'\]\[0\]"),
    "entries": (
        own_entries,
        r"SGD keeps 4 entries beside as many parameters in param_groups\[0\]\['scales'\], and the weight",
    ),
    "schedule": (schedule, r"SGD holds the weight of site '0' in 'weight' in a function of schedule.lr_lambdas\[0\]"),
    "state": (own_state, r"SGD holds the weight of site '0' in state\['all'\]\['trained'\]\[0\] too"),
    "step hook": (
        step_hook,
        r"SGD holds the weight of site '0' in 'parameters' in a function of _optimizer_step_post_hooks",
    ),
}


@pytest.mark.parametrize(("build", "text"), HOLDING.values(), ids=HOLDING.keys())
def test_what_an_optimizer_holds_besides_is_refused_by_its_name(
    build: Callable[[nn.Module], Optimizer], text: str
) -> None:
    model = mlp()
    optimizer = build(model)
    step(model, optimizer)
    check_refused(lambda: tdfx.rewrite(model, HALF, optimizer=optimizer), tdfx.OptimizerError, text, model, optimizer)


def test_a_list_of_factors_is_refused_at_the_merge() -> None:
    model = mlp()
    optimizer: Any = sgd(model)
    rewritten = tdfx.rewrite(model, HALF, optimizer=optimizer)
    optimizer.mine = list(rewritten.parameters())
    text = r"SGD holds the weight of site '0' in mine\[0\] too"
    check_refused(lambda: tdfx.merge(rewritten, optimizer=optimizer), tdfx.OptimizerError, text, rewritten, optimizer)
    optimizer.mine.clear()
    tdfx.merge(rewritten, optimizer=optimizer)


def test_a_model_that_is_rewritten_in_place_may_be_held() -> None:
    model: Any = nn.Sequential(mlp())
    optimizer = own_model(model)
    part = InPlaceModule(model, "0")
    part.replace_with(tdfx.rewrite(part, HALF, optimizer=optimizer, emit="modules"))
    assert sum(isinstance(module, tdfx.Factorized) for module in model.modules()) > 0
    part = InPlaceModule(model, "0")
    part.replace_with(tdfx.merge(part, optimizer=optimizer))
    own: Any = optimizer
    own.read = model[0][0].parameters
    with pytest.raises(tdfx.OptimizerError, match="refers to a Linear with the weight of site '0'"):
        tdfx.rewrite(InPlaceModule(model, "0"), HALF, optimizer=optimizer, emit="modules")


def test_a_hook_that_asks_the_optimizer_is_no_holder() -> None:
    model = mlp()
    optimizer = sgd(model)

    def clamp(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.clamp_(-1, 1)

    optimizer.register_step_post_hook(clamp)
    scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    cast("Any", optimizer).schedule = [scheduler]
    step(model, optimizer)
    step(tdfx.rewrite(model, HALF, optimizer=optimizer), optimizer)


@pytest.mark.parametrize("build", [WRAPPERS["lookahead"], WRAPPERS["chained"]], ids=["lookahead", "chained"])
def test_inner_optimizers_are_saved_and_loaded(build: Callable[[nn.Module], Any], tmp_path: Any) -> None:
    model = mlp()
    optimizer = build(model)
    step(model, optimizer)
    result = tdfx.rewrite(model, HALF, optimizer=optimizer)
    for _ in range(3):
        step(result, optimizer)
    tdfx.save(result, tmp_path / "run.tdfx", optimizer=optimizer)
    other_model = mlp()
    other = build(other_model)
    vars(other)["count"] = vars(optimizer).get("count", 0)
    again = tdfx.load(tmp_path / "run.tdfx", other_model, optimizer=other)
    for _ in range(3):
        step(result, optimizer)
        step(again, other)
    assert all(map(torch.equal, result.state_dict().values(), again.state_dict().values()))


def test_a_list_of_the_dense_parameters_is_refused_when_a_checkpoint_is_loaded(tmp_path: Any) -> None:
    tdfx.save(tdfx.rewrite(mlp(), HALF), tmp_path / "run.tdfx", optimizer=None)
    model = mlp()
    optimizer = own_list(model)
    check_refused(
        lambda: tdfx.load(tmp_path / "run.tdfx", model, optimizer=optimizer),
        tdfx.OptimizerError,
        r"SGD holds the parameter '0.weight' in mine",
        model,
        optimizer,
    )


class Net(nn.Module):
    """Two layers, with something that holds their weights besides."""

    def __init__(self, hold: Callable[[Any], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.double()
        hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.b(self.a(x).relu()))


def in_list(net: Any) -> None:
    net.decayed = [net.a.weight]


def in_ids(net: Any) -> None:
    net.skipped = {id(net.a.weight)}


def in_other_module(net: Any) -> None:
    other = nn.Linear(16, 32)
    other.weight = net.a.weight
    net.plain = [nn.Sequential(other)]


def in_class(net: Any) -> None:
    net.__class__ = type("Own", (Net,), {"decayed": (net.a.weight,)})


def in_method(net: Any) -> None:
    weight = net.a.weight

    class Own(Net):
        def penalty(self) -> Tensor:
            return cast("Tensor", weight.square().sum())

    net.__class__ = Own


def in_closure(net: Any) -> None:
    weight = net.a.weight
    net.penalty = lambda: weight.square().sum()


def in_object(net: Any) -> None:
    net.helper = Average(net)
    net.helper.shadow = {"first": [net.a.weight.data.t()]}


def in_buffer(net: Any) -> None:
    net.register_buffer("transposed", net.a.weight.data.t(), persistent=False)


def tied_by_memory(net: Any) -> None:
    net.b.weight.data = net.a.weight.data.t()


READ, TIED = tdfx.Reason.READ_ELSEWHERE, tdfx.Reason.TIED
HELD: dict[str, tuple[Callable[[Any], None], tdfx.Reason, str]] = {
    "list": (in_list, READ, "the model holds its weight in decayed[0] too"),
    "ids": (in_ids, READ, "the model refers to its weight by its id, in skipped[0]"),
    "other module": (in_other_module, READ, "the model holds its weight in plain[0].0.weight too"),
    "class": (in_class, READ, "the model holds its weight in Own.decayed[0] too"),
    "method": (in_method, READ, "the model holds its weight in 'weight' in a function of Own.penalty too"),
    "closure": (in_closure, READ, "the model holds its weight in 'weight' in a function of penalty too"),
    "object": (in_object, READ, "the model holds its weight in helper.shadow['first'][0] too"),
    "buffer": (in_buffer, TIED, "it shares its memory with 'transposed'"),
    "memory": (tied_by_memory, TIED, "it shares its memory with 'b.weight'"),
}


@every_emit
@pytest.mark.parametrize(("hold", "reason", "note"), HELD.values(), ids=HELD.keys())
def test_a_weight_that_the_model_holds_besides_is_kept(
    hold: Any, reason: tdfx.Reason, note: str, emit: tdfx.Emit
) -> None:
    model = Net(hold)
    plan = tdfx.plan(model, HALF, emit=emit)
    sites = {site.name: site for site in plan}
    assert (sites["a"].reason, sites["a"].note) == (reason, note)
    assert sites["b"].factorized == (hold is not tied_by_memory)
    result = cast("Net", tdfx.rewrite(model, plan))
    assert result.a.weight is model.a.weight


def test_weights_in_one_flat_tensor_are_not_tied() -> None:
    def flat(net: Any) -> None:
        values = torch.randn(2 * 512, dtype=torch.float64)
        net.a.weight.data, net.b.weight.data = values[:512].view(32, 16), values[512:].view(16, 32)

    assert all(site.factorized for site in tdfx.plan(Net(flat), HALF))


def momentum_encoder(net: Any) -> None:
    net.momentum = copy.deepcopy(net.a).requires_grad_(False)
    with torch.no_grad():
        net.momentum.weight.mul_(0.9).add_(torch.randn_like(net.momentum.weight), alpha=0.01)


def averaged_module(net: Any) -> None:
    net.ema = AveragedModel(net.a)


def average_by_name(net: Any) -> None:
    net.average = Average(net)


COPIES = {
    "momentum": (momentum_encoder, "1 copies.* 'momentum.weight' of site 'a'"),
    "module": (averaged_module, "1 copies.* 'ema.module.weight' of site 'a'"),
    "object": (average_by_name, r"2 copies.*average.shadow\['a.weight'\].* of site 'a'"),
}


@pytest.mark.parametrize(("hold", "text"), COPIES.values(), ids=COPIES.keys())
def test_copies_of_weights_inside_the_model_are_named_before_anything_changes(hold: Any, text: str) -> None:
    model = Net(hold)
    optimizer = SGD([*model.a.parameters(), *model.b.parameters()], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_refused(lambda: tdfx.rewrite(model, HALF, optimizer=optimizer), tdfx.TdfxWarning, text, model, optimizer)
    with pytest.warns(tdfx.TdfxWarning, match=text):
        tdfx.rewrite(model, HALF, optimizer=optimizer)


def test_a_frozen_layer_of_other_values_is_no_copy() -> None:
    def frozen(net: Any) -> None:
        net.teacher = nn.Linear(16, 32, dtype=torch.float64).requires_grad_(False)

    tdfx.rewrite(Net(frozen), HALF)


def test_hooks_of_factors_that_a_merge_loses_are_named() -> None:
    model = cast("Net", tdfx.rewrite(Net(lambda net: None), HALF))
    cast("Any", model.a).factors[0].weight.register_hook(lambda gradient: gradient * 2)
    with pytest.warns(tdfx.TdfxWarning, match=r"A factor of site 'a' has hooks .* the merged weight does not get"):
        tdfx.merge(model)


def test_the_search_ends_where_it_should() -> None:
    weight, inner = torch.ones(2), sgd(mlp())
    circle: list[Any] = [weight]
    circle += [circle, {"optimizer": inner}, mlp(), "text", 3.0]
    found = {item.path: type(item.value).__name__ for item in search(circle, "held")}
    assert found == {"held[0]": "Tensor", "held[2]['optimizer']": "SGD", "held[3]": "Sequential"}
    assert not share_memory(weight, torch.ones(2))
    assert share_memory(weight, weight[1:])
    assert not list(search(range(5), "held")), re.escape("a range holds nothing of its own")


def test_another_model_of_the_same_optimizer_that_shares_a_layer_is_warned_of() -> None:
    shared = nn.Linear(16, 16)
    first, second = (nn.Sequential(shared, nn.ReLU(), nn.Linear(16, size)) for size in (16, 4))
    optimizer = SGD({*first.parameters(), *second.parameters()}, lr=0.1)
    with pytest.warns(
        tdfx.TdfxWarning, match=r"Another model, a Sequential, holds the weight of site '0' too .* exclude="
    ):
        tdfx.rewrite(first, HALF, optimizer=optimizer)


@pytest.mark.filterwarnings("error")
def test_the_model_around_a_part_is_no_other_model() -> None:
    whole = nn.ModuleDict({"part": nn.Sequential(nn.Linear(16, 16)), "head": nn.Linear(16, 4)})
    optimizer = SGD(whole.parameters(), lr=0.1)
    unrelated = nn.Sequential(nn.Linear(16, 16))
    optimizer.add_param_group({"params": list(unrelated.parameters())})
    whole["part"] = tdfx.rewrite(whole["part"], HALF, optimizer=optimizer)


def test_a_copy_of_the_model_in_a_list_is_warned_of() -> None:
    model: Any = mlp()
    model.teacher = [copy.deepcopy(mlp())]
    with pytest.warns(tdfx.TdfxWarning, match=r"holds 2 copies of weights .*'teacher\[0\].0.weight'"):
        tdfx.rewrite(model, HALF, optimizer=SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1))


def test_entries_for_each_parameter_in_a_tuple_are_refused() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["scales"] = (1.0, 2.0, 1.0, 2.0)
    with pytest.raises(tdfx.OptimizerError, match=r"keeps 4 entries beside as many parameters in param_groups\[0\]"):
        tdfx.rewrite(model, HALF, optimizer=optimizer)


def test_an_optimizer_without_state_is_refused() -> None:
    class Outer(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            self.inner, self.param_groups = inner, inner.param_groups

    model = mlp()
    with pytest.raises(tdfx.OptimizerError, match=r"Outer has no attribute 'state', .* self.state = inner.state"):
        tdfx.rewrite(model, HALF, optimizer=Outer(SGD(model.parameters(), lr=0.1)))

"""A part that is rewritten inside of a model: what the model around it holds of the part is kept, or named."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import tdfx
from tdfx.wrappers.in_place import InPlaceModule

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
READ, TIED = tdfx.Reason.READ_ELSEWHERE, tdfx.Reason.TIED


class Whole(nn.Module):
    """As a LightningModule around the network that it trains."""

    def __init__(self, hold: Callable[[Any], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 32)
        self.double()
        hold(self)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.head(self.net(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 16, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def rewritten(hold: Callable[[Any], None]) -> tuple[Any, tdfx.Plan]:
    """Return a model whose part was rewritten and trained, with the plan."""
    model: Any = Whole(hold)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    part = InPlaceModule(model, "net")
    plan = tdfx.plan(part, HALF, emit="modules")
    part.replace_with(tdfx.rewrite(part, plan, optimizer=optimizer))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer)
    assert not any(map(torch.equal, before, model.parameters()))
    return model, plan


def clamp(whole: Any, given: Any) -> None:
    whole.net[0].weight.data.clamp_(-1, 1)


def tie(whole: Any) -> None:
    whole.head.weight = whole.net[0].weight


OUTSIDE: dict[str, tuple[Callable[[Any], Any], tdfx.Reason, str]] = {
    "list": (
        lambda whole: setattr(whole, "decayed", [whole.net[0].weight]),
        READ,
        "the model holds its weight in decayed[0] too",
    ),
    "penalty": (
        lambda whole: setattr(whole, "penalty", functools.partial(torch.norm, whole.net[0].weight)),
        READ,
        "the model holds its weight in penalty[0] too",
    ),
    "ids": (
        lambda whole: setattr(whole, "sums", {id(whole.net[0].weight): 0.0}),
        READ,
        "the model refers to its weight by its id, in a key of sums",
    ),
    "layer": (
        lambda whole: setattr(whole, "first", whole.net[0]),
        READ,
        "the model holds its weight in first.weight too",
    ),
    "layers": (
        lambda whole: setattr(whole, "layers", {"first": [whole.net[0]]}),
        READ,
        "the model holds its weight in layers['first'][0].weight too",
    ),
    "tied": (tie, TIED, "2 modules hold its weight"),
    "hook": (
        lambda whole: whole.register_forward_pre_hook(clamp),
        READ,
        "a hook on Whole, clamp, may read or write it",
    ),
}


@pytest.mark.parametrize(("hold", "reason", "note"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_the_model_around_a_part_holds_is_kept(hold: Any, reason: tdfx.Reason, note: str) -> None:
    model, plan = rewritten(hold)
    sites = {site.name: site for site in plan}
    assert (sites["0"].reason, sites["0"].note) == (reason, note)
    assert isinstance(model.net[0], nn.Linear)
    if "hook" not in note:  # which may write all weights
        assert isinstance(model.net[2], tdfx.Factorized)


def parent(whole: Any) -> None:
    whole.net.parent, whole.networks = [whole], {"trained": whole.net}


@pytest.mark.parametrize("hold", [lambda _: None, parent], ids=["nothing", "the whole and the part"])
def test_what_stays_the_same_object_may_be_held(hold: Any) -> None:
    model, _ = rewritten(hold)
    assert all(isinstance(model.net[index], tdfx.Factorized) for index in (0, 2))


def momentum(whole: Any) -> None:
    whole.momentum = copy.deepcopy(whole.net).requires_grad_(False)


def test_copies_beside_a_part_are_named_before_anything_changes() -> None:
    model = Whole(momentum)
    before = [id(parameter) for parameter in model.parameters()]
    optimizer = torch.optim.SGD([*model.net.parameters(), *model.head.parameters()], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tdfx.TdfxWarning, match=r"2 copies.*'momentum.0.weight' of site '0' first"):
            tdfx.rewrite(InPlaceModule(model, "net"), HALF, optimizer=optimizer, emit="modules")
    assert [id(parameter) for parameter in model.parameters()] == before
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} <= set(before)


def test_an_average_beside_a_part_that_goes_along_is_no_such_copy() -> None:
    model: Any = Whole(lambda whole: setattr(whole, "ema", AveragedModel(whole.net)))
    optimizer = torch.optim.SGD([*model.net.parameters(), *model.head.parameters()], lr=0.1)
    part = InPlaceModule(model, "net")
    part.replace_with(tdfx.rewrite(part, HALF, optimizer=optimizer, averaged=model.ema, emit="modules"))
    model.ema.update_parameters(model.net)
    assert isinstance(model.ema.module[0], tdfx.Factorized)

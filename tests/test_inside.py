"""What the callbacks share, without a framework: rewriting in place, and following the form of what is loaded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import tdfx
from tdfx.integrations.adapter import TrainerAdapter
from tdfx.integrations.follow import FollowCheckpoint, names_of, restore_order
from tdfx.integrations.versions import check_version
from tdfx.layers.factorized import Factorized
from tdfx.wrappers.in_place import InPlaceModule, replace_in_place

POLICY = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Holds its own layers and its own method in attributes, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.fc = nn.Linear(1024, 32)
        self.listed = [self.conv]
        self.call = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.conv(x).flatten(1))
        return out


class Holder(nn.Module):
    """Holds a model, as the module of a trainer does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.other = nn.Linear(4, 4)


def sites(model: nn.Module) -> int:
    return sum(isinstance(module, Factorized) for module in model.modules())


def make_adapter(policy: tdfx.Policy = POLICY, **settings: Any) -> TrainerAdapter:
    adapter = TrainerAdapter(policy, **{"epoch": 1, **settings})
    adapter.advice = "Do this."
    return adapter


def test_a_part_is_rewritten_in_place() -> None:
    holder = Holder()
    net, part = holder.net, InPlaceModule(holder, "net")
    expected = tdfx.rewrite(net, POLICY, emit="modules")
    rewritten = tdfx.rewrite(part, POLICY, emit="modules")
    assert isinstance(rewritten, Net)
    assert sites(holder) == 0
    part.replace_with(rewritten)
    assert holder.net is net
    assert sites(holder) == sites(net) == 2
    assert torch.equal(net(X), expected(X))
    assert net.listed == [net.conv]
    assert cast("MethodType", net.call).__self__ is net
    assert torch.equal(net.call(X), expected(X))
    part.replace_with(tdfx.merge(part))
    assert list(holder.state_dict()) == list(Holder().state_dict())
    torch.testing.assert_close(net(X), expected(X))
    assert "_tdfx_plan" not in vars(net)


def test_a_part_of_a_compiled_model_is_compiled_again() -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = cast("nn.Module", torch.compile(net, backend="eager"))
    before = compiled(X)
    part = InPlaceModule(compiled)
    assert part.target is net
    part.replace_with(tdfx.rewrite(part, POLICY, emit="modules"))
    assert torch.equal(compiled(X), net(X))
    assert not torch.allclose(compiled(X), before)


def test_a_compiled_child_is_rewritten_in_place() -> None:
    holder = Holder()
    net = holder.net
    holder.net = torch.compile(net, backend="eager")  # type: ignore[assignment]
    part = InPlaceModule(holder, "net")
    part.replace_with(tdfx.rewrite(part, POLICY, emit="modules"))
    assert sites(net) == 2
    assert torch.equal(holder.net(X), net(X))


def test_a_missing_part_and_a_single_layer_are_refused() -> None:
    with pytest.raises(tdfx.ModelError, match=r"Holder has no module 'nett' to be rewritten. It has 'net', 'other'"):
        InPlaceModule(Holder(), "nett")
    part = InPlaceModule(Holder(), "other")
    rewritten = tdfx.rewrite(part, POLICY, emit="modules")
    with pytest.raises(tdfx.ModelError, match=r"A Linear cannot become a Factorized.*Name the module that holds it"):
        part.replace_with(rewritten)
    with pytest.raises(tdfx.ModelError, match="a single Linear"):
        make_adapter().begin(InPlaceModule(nn.Linear(4, 4)), [], steps_per_epoch=lambda: 1, steps_left=1)


def test_a_module_takes_the_form_of_what_is_loaded() -> None:
    dense, split = Net(), Net()
    replace_in_place(split, tdfx.rewrite(split, POLICY, emit="modules"))
    plan = tdfx.plan(dense, POLICY, emit="modules")
    half = Net()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, include=("fc",))
    replace_in_place(half, tdfx.rewrite(half, policy, emit="modules"))
    follower = Holder()
    cast("Any", follower.net).register_load_state_dict_pre_hook(FollowCheckpoint(lambda: plan, ""))
    for model, count in ((split, 2), (half, 1), (dense, 0), (split, 2), (split, 2), (dense, 0)):
        follower.load_state_dict({f"net.{key}": value for key, value in model.state_dict().items()}, strict=False)
        assert sites(follower) == count
        assert torch.equal(follower.net(X), model(X))


def test_a_hook_of_the_whole_finds_the_part_when_something_is_loaded() -> None:
    split, holder = Holder(), Holder()
    replace_in_place(split.net, tdfx.rewrite(split.net, POLICY, emit="modules"))
    plan = tdfx.plan(Net(), POLICY, emit="modules")
    del holder.net
    hook = FollowCheckpoint(lambda: plan, "", lambda module: cast("Holder", module).net)
    cast("Any", holder).register_load_state_dict_pre_hook(hook)
    holder.net = cast("Net", torch.compile(Net(), backend="eager"))
    holder.load_state_dict({key.replace("net.", "net._orig_mod."): value for key, value in split.state_dict().items()})
    assert sites(holder) == 2
    assert torch.equal(holder.net(X), split.net(X))


def test_a_state_without_a_site_leaves_it_as_it_is() -> None:
    split = Net()
    replace_in_place(split, tdfx.rewrite(split, POLICY, emit="modules"))
    cast("Any", split).register_load_state_dict_pre_hook(FollowCheckpoint(lambda: None, ""))
    split.load_state_dict({"fc.bias": torch.zeros(32)}, strict=False)
    assert sites(split) == 2


def test_a_factorized_site_that_is_not_loaded_keeps_its_values() -> None:
    split, dense = Net(), Net()
    plan = tdfx.plan(split, POLICY, emit="modules")
    replace_in_place(split, tdfx.rewrite(split, plan))
    joined = tdfx.merge(split).get_parameter("fc.weight").detach().clone()
    cast("Any", split).register_load_state_dict_pre_hook(FollowCheckpoint(lambda: plan, ""))
    split.load_state_dict(
        {key: value for key, value in dense.state_dict().items() if key.startswith("conv")}, strict=False
    )
    assert sites(split) == 1
    assert torch.equal(cast("Any", split.conv).weight, dense.conv.weight)
    torch.testing.assert_close(tdfx.merge(split).get_parameter("fc.weight"), joined)


def test_factors_of_an_unknown_split_change_nothing() -> None:
    split, fresh = Net(), Net()
    replace_in_place(split, tdfx.rewrite(split, POLICY, emit="modules"))
    before = copy.deepcopy(fresh.state_dict())
    cast("Any", fresh).register_load_state_dict_pre_hook(FollowCheckpoint(lambda: None, "Do this."))
    with pytest.raises(tdfx.CheckpointError, match=r"factors of 2 sites, 'conv' first.*Do this."):
        fresh.load_state_dict(split.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_copies_follow_and_pickles_do_not() -> None:
    net = Net()
    plan = tdfx.plan(net, POLICY, emit="modules")
    split = tdfx.rewrite(net, plan)
    cast("Any", net).register_load_state_dict_pre_hook(FollowCheckpoint(lambda: plan, ""))
    twin = copy.deepcopy(net)
    twin.load_state_dict(split.state_dict())
    assert (sites(twin), sites(net)) == (2, 0)
    unpickled = pickle.loads(pickle.dumps(net))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        unpickled.load_state_dict(split.state_dict())


def test_groups_get_the_order_in_which_they_were_saved() -> None:
    """States that torch assigned by position end at their own parameters."""
    net: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    saved = AdamW([net[0].weight, net[1].weight, net[0].bias, net[1].bias], lr=0.1)
    net(torch.randn(3, 4)).square().sum().backward()
    saved.step()
    names, state = names_of([saved], net), copy.deepcopy(saved.state_dict())
    resumed = AdamW([net[1].weight, net[0].weight, net[1].bias, net[0].bias], lr=0.1)
    resumed.load_state_dict(state)
    assert not torch.equal(resumed.state[net[0].weight]["exp_avg"], saved.state[net[0].weight]["exp_avg"])
    restore_order([resumed], names, net)
    for parameter in net.parameters():
        assert torch.equal(resumed.state[parameter]["exp_avg"], saved.state[parameter]["exp_avg"])
    assert [id(parameter) for parameter in resumed.param_groups[0]["params"]] == [
        id(parameter) for parameter in saved.param_groups[0]["params"]
    ]


def test_groups_of_other_parameters_are_refused() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    names = names_of([SGD([net[0].weight, net[0].bias], lr=0.1)], net)
    with pytest.raises(tdfx.OptimizerError, match=r"held 2 parameters when it was saved and holds 2 now, and 0.bias"):
        restore_order([SGD([net[0].weight, net[1].bias], lr=0.1)], names, net)


def test_an_old_version_of_a_framework_is_refused() -> None:
    check_version("transformers", "5.0.0", "4.57")
    text = r"works with transformers 4.57 and newer, and 4.46.3 is installed. Upgrade it: .*'tdfx\[transformers\]'"
    with pytest.raises(ImportError, match=text):
        check_version("transformers", "4.46.3", "4.57")


@pytest.mark.parametrize(
    ("module", "extra", "missing"),
    [
        ("lightning", "tdfx[lightning]", ("lightning", "pytorch_lightning")),
        ("transformers", "tdfx[transformers]", ("transformers",)),
    ],
)
def test_without_the_framework_the_error_says_what_to_install(
    module: str, extra: str, missing: tuple[str, ...]
) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
    code = f"import sys; {blocked}import tdfx.integrations.{module}"
    root = str(Path(tdfx.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"which is not installed. Install it: pip install '{extra}'" in done.stderr

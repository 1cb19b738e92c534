"""What two processes check together of models that fully_shard was called on; test_fsdp.py starts it.

Each function whose name starts with ``check_`` runs on both processes, with a mesh of both.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tdfx
from tdfx.cost.count import Flow
from tdfx.factors.svd import Svd
from tdfx.layers.factorized import Factorized

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
X = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
ROUNDING = 1e-11
"""A dozen steps in float64 on numbers about 1: some 1e4 roundings of 1e-16, and room for what training amplifies."""


class Block(nn.Module):
    """Its sizes do not divide evenly."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 33)
        self.down = nn.Linear(33, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.kernel = nn.Parameter(torch.randn(12, 24) / 5)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(F.linear(x, self.kernel))  # type: ignore[no-any-return]


def net() -> Any:
    torch.manual_seed(0)
    return Net().double()


def sharded(model: nn.Module | None = None, mesh: DeviceMesh | None = None, **settings: Any) -> Any:
    made: Any = net() if model is None else model
    for block in made.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(made, mesh=mesh, **settings)


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(one) for name, one in model.state_dict().items()}


def far(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert list(one) == list(other), (list(one), list(other))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def batches(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(8, 16, generator=generator, dtype=torch.float64),
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
        )


def train(model: nn.Module, optimizer: Optimizer, seed: int, *, parts: bool, count: int = 3) -> None:
    """Train on whole batches, or each process on its half: the mean of the halves' gradients is the whole's."""
    for x, y in batches(seed, count):
        if parts:
            half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
            x, y = x[half], y[half]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


@dataclass
class Run:
    small: nn.Module
    dense: nn.Module
    factorized: dict[str, Tensor]
    merged: dict[str, Tensor]
    optimizer: Optimizer


def whole_run(
    model: nn.Module, make: Callable[[Any], Optimizer], *, parts: bool, carry: bool = True, policy: Any = HALF
) -> Run:
    """Train, rewrite, train, merge, train."""
    optimizer = make(model.parameters())
    train(model, optimizer, 1, parts=parts)
    small = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer, emit="modules")
    if not carry:
        optimizer.state.clear()
    train(small, optimizer, 2, parts=parts)
    factorized = values(small)
    dense = tdfx.merge(small, optimizer=optimizer)
    train(dense, optimizer, 3, parts=parts)
    return Run(small, dense, factorized, values(dense), optimizer)


def compare_runs(make: Callable[[Any], Optimizer], mesh: DeviceMesh, **settings: Any) -> None:
    here, there = whole_run(sharded(mesh=mesh, **settings), make, parts=True), whole_run(net(), make, parts=False)
    assert far(here.factorized, there.factorized) < ROUNDING
    assert far(here.merged, there.merged) < ROUNDING
    assert any(".factors." in name for name in here.factorized)
    other = whole_run(net(), make, parts=False, carry=False)
    assert far(here.factorized, other.factorized) > 1e-3, "without its state the optimizer goes elsewhere"


def check_sgd_is_the_single_process_run(mesh: DeviceMesh) -> None:
    compare_runs(lambda one: SGD(one, lr=0.05, momentum=0.9), mesh)


def check_adamw_is_the_single_process_run(mesh: DeviceMesh) -> None:
    compare_runs(lambda one: AdamW(one, lr=0.01), mesh)


def check_always_resharded_is_the_single_process_run(mesh: DeviceMesh) -> None:
    compare_runs(lambda one: Adam(one, lr=0.01), mesh, reshard_after_forward=True)


def check_never_resharded_is_the_single_process_run(mesh: DeviceMesh) -> None:
    compare_runs(lambda one: SGD(one, lr=0.05, momentum=0.9), mesh, reshard_after_forward=False)


def check_hybrid_sharding_is_the_single_process_run(mesh: DeviceMesh) -> None:
    for shape in ((1, 2), (2, 1)):
        hybrid = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        compare_runs(lambda one: SGD(one, lr=0.05, momentum=0.9), hybrid)


def check_offloaded_is_the_single_process_run(mesh: DeviceMesh) -> None:
    compare_runs(lambda one: SGD(one, lr=0.05, momentum=0.9), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))


def check_factors_have_the_bits_of_an_unsharded_rewrite(mesh: DeviceMesh) -> None:
    here = tdfx.rewrite(sharded(mesh=mesh), HALF, example_inputs=X)
    there = tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")
    assert far(values(here), values(there)) == 0.0
    merged = values(tdfx.merge(here))
    assert far(merged, values(tdfx.merge(there))) == 0.0
    assert far(merged, values(net())) > 1e-3, "half of the ranks lose something"
    exact = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
    assert far(values(tdfx.merge(tdfx.rewrite(sharded(mesh=mesh), exact))), values(net())) < ROUNDING


def check_plan_is_one_for_all(mesh: DeviceMesh) -> None:
    class Partial:
        """A clock that says something else on each process."""

        def seconds(self, chain: Sequence[Any], flow: Flow | None) -> float:
            return float(len(chain) if dist.get_rank() else 1 / len(chain))

    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), cost=Partial(), round_to=1)
    made = tdfx.plan(sharded(mesh=mesh), policy, example_inputs=X)
    both: list[Any] = [None, None]
    dist.all_gather_object(both, made.to_json())
    assert both[0] == both[1]
    assert len(made.factorized) == len(made.sites) == 7
    alone = tdfx.plan(net(), policy, example_inputs=X)
    assert (len(alone.factorized) == 0) == bool(dist.get_rank()), "each alone would decide otherwise"
    rule = tdfx.Policy(rank=tdfx.Target(parameters=0.7), min_gain=0)
    here, there = tdfx.plan(sharded(mesh=mesh), rule), tdfx.plan(net(), rule)
    assert here.sites == there.sites
    assert here.emit == "modules"
    assert any("fully_shard gathers parameters where modules are called" in note for note in here.notes)


def check_a_plan_goes_in_place_of_a_policy(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    made = tdfx.Plan.from_json(tdfx.plan(net(), HALF, example_inputs=X).to_json())
    assert made.emit == "graph"
    small = tdfx.rewrite(model, made)
    assert far(values(small), values(tdfx.rewrite(model, HALF, example_inputs=X))) == 0.0
    assert isinstance(small, FSDPModule)


def check_boundaries_and_settings_are_as_before(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64)
    model = net()
    first, second = model.blocks
    fully_shard(first, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(second, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, mesh=mesh)
    model.blocks[0].set_modules_to_forward_prefetch([second])
    model.blocks[1].set_requires_all_reduce(False)
    model.blocks[1].set_reshard_after_backward(False)
    model.set_is_last_backward(False)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    dense: Any = tdfx.merge(small)
    for made in (small, dense):
        assert [path for path, one in made.named_modules() if isinstance(one, FSDPModule)] == [
            "",
            "blocks.0",
            "blocks.1",
        ]
        assert type(made) is type(model)
        states = {path: made.get_submodule(path)._get_fsdp_state() for path in ("", "blocks.0", "blocks.1")}
        groups = {path: state._fsdp_param_group for path, state in states.items()}
        assert all(group.mesh_info.mesh is mesh for group in groups.values())
        assert groups["blocks.0"].post_forward_mesh_info is None
        assert groups["blocks.1"].post_forward_mesh_info is groups["blocks.1"].mesh_info
        assert [states[path]._auto_reshard_after_forward for path in states] == [True, False, True]
        assert states["blocks.0"]._mp_policy == policy
        assert states["blocks.1"]._mp_policy == MixedPrecisionPolicy()
        assert isinstance(groups["blocks.1"].offload_policy, CPUOffloadPolicy)
        assert not isinstance(groups["blocks.0"].offload_policy, CPUOffloadPolicy)
        assert states["blocks.0"]._states_to_forward_prefetch == [states["blocks.1"]]
        assert not groups["blocks.1"].all_reduce_grads
        assert groups["blocks.0"].all_reduce_grads
        assert not groups["blocks.1"].reshard_after_backward
        assert not states[""]._state_ctx.is_last_backward
        names = {path: [one._module_info.param_name for one in group.fsdp_params] for path, group in groups.items()}
        assert len(names["blocks.0"]) == len(list(made.blocks[0].parameters()))
    assert small.blocks[0].up.factors[0].weight.placements == (Shard(0),)
    assert not any(isinstance(one, FSDPModule) for one in tdfx.rewrite(net(), HALF).modules())


def check_each_process_holds_only_its_shards(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 1, parts=True)
    small = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer)
    for made in (small, None):
        if made is None:
            made = tdfx.merge(small, optimizer=optimizer)
        train(made, optimizer, 2, parts=True)
        for parameter in made.parameters():
            assert isinstance(parameter, DTensor)
            chunks = [one.shape[0] for one in torch.empty(parameter.shape).chunk(2)] + [0]
            assert parameter.to_local().shape == (chunks[dist.get_rank()], *parameter.shape[1:])
            state = optimizer.state[parameter]
            assert state["exp_avg"].to_local().shape == parameter.to_local().shape
            assert isinstance(state["exp_avg_sq"], DTensor)
        mine = sum(one.to_local().numel() for one in made.parameters())  # type: ignore[attr-defined]
        total = sum(one.numel() for one in made.parameters())
        assert mine < 0.6 * total, "uneven parameters give the first process a little more than half"
    held = [one for group in optimizer.param_groups for one in group["params"]]
    assert len(held) == len(optimizer.state)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes alive at once in the tensors that operations made since it began to watch.

    What a DTensor holds is not counted: that is this process's own part.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self.made: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if type(one) is Tensor}
        known -= {one.untyped_storage().data_ptr() for one in self.alive()}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if type(one) is Tensor and one.untyped_storage().data_ptr() not in known:
                self.made[id(one)] = weakref.ref(one)
        held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in self.alive()}
        self.most = max(self.most, sum(held.values()))
        return result

    def alive(self) -> list[Tensor]:
        self.made = {key: one for key, one in self.made.items() if one() is not None}
        return [one for reference in self.made.values() if (one := reference()) is not None]


def check_no_process_ever_holds_the_model(mesh: DeviceMesh) -> None:
    layers = 32

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = sharded(Deep().double(), mesh)
    size = layers * 64 * 64 * 8
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(2, 64, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1 / 8), min_gain=0)
    rewriting = Live()
    with rewriting:
        small = tdfx.rewrite(model, policy, example_inputs=x, optimizer=optimizer)
    assert 0 < rewriting.most < size / 4, rewriting.most / size
    merging = Live()
    with merging:
        dense = tdfx.merge(small, optimizer=optimizer)
    assert 0 < merging.most < size / 4, merging.most / size
    gathering = Live()
    with gathering:
        held = [whole(one) for one in dense.parameters()]
    assert gathering.most >= size, "the meter sees it where a process does hold it"
    del held


def check_kept_parameters_are_shared_and_the_input_still_works(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, 1, parts=True)
    before, output = values(model), model(X).detach()
    model.reshard()
    shards = {name: one.to_local().data_ptr() for name, one in model.named_parameters()}
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, include=("blocks.*",))
    small: Any = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer)
    kept, now = dict(model.named_parameters()), dict(small.named_parameters())
    shared = [name for name in kept if name in now]
    assert "last.weight" in shared
    assert "blocks.0.norm.weight" in shared
    assert all(kept[name] is now[name] for name in shared)
    assert now["blocks.0.up.factors.1.bias"] is kept["blocks.0.up.bias"]
    assert torch.equal(model(X), output)
    assert not torch.equal(small(X), output)
    model.reshard()
    assert far(values(model), before) == 0.0
    assert {name: one.to_local().data_ptr() for name, one in model.named_parameters()} == shards
    train(small, optimizer, 2, parts=True)
    after = values(model)
    assert not torch.equal(after["last.weight"], before["last.weight"])
    assert torch.equal(after["blocks.0.up.weight"], before["blocks.0.up.weight"])
    # The old model computes with the shards that it shares, uneven ones too.
    plain = net()
    plain.load_state_dict(after)
    assert torch.allclose(model(X), plain(X), rtol=0, atol=ROUNDING)


def check_before_and_after_the_first_forward(mesh: DeviceMesh) -> None:
    fresh = sharded(mesh=mesh)
    used = sharded(mesh=mesh)
    with torch.no_grad():
        used(X)  # leaves the root's parameters gathered
    assert not isinstance(used.kernel, DTensor)
    small, other = (tdfx.rewrite(one, HALF, example_inputs=X) for one in (fresh, used))
    assert far(values(small), values(other)) == 0.0
    assert torch.equal(small(X), other(X))


def check_models_made_on_the_meta_device(mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        empty = Net().double()
    model = sharded(empty, mesh)
    with refused(tdfx.WeightError, "is on the meta device and has no values"):
        tdfx.rewrite(model, HALF)
    model.to_empty(device="cpu")
    for name, value in net().state_dict().items():
        owner, _, key = name.rpartition(".")
        parameter = model.get_submodule(owner)._parameters[key]
        parameter.data.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    assert far(values(tdfx.rewrite(model, HALF)), values(tdfx.rewrite(sharded(mesh=mesh), HALF))) == 0.0


@contextmanager
def refused(kind: type[Exception], text: str) -> Iterator[None]:
    raised = ""
    try:
        yield
    except kind as error:
        raised = str(error)
    assert text in raised, raised or f"nothing raised {kind.__name__}"


def check_a_failure_changes_nothing(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 1, parts=True)
    before, parameters = values(model), list(model.parameters())
    state = {id(one): {key: whole(value) for key, value in optimizer.state[one].items()} for one in parameters}

    def unchanged() -> None:
        assert far(values(model), before) == 0.0
        assert all(now is old for now, old in zip(model.parameters(), parameters, strict=True))
        assert optimizer.param_groups[0]["params"] == parameters
        for one in parameters:
            assert all(torch.equal(whole(value), state[id(one)][key]) for key, value in optimizer.state[one].items())

    split = Svd.split

    def failing(*arguments: Any) -> Any:
        if dist.get_rank() == 1:
            raise ArithmeticError("only the second process fails")
        return split(*arguments)

    Svd.split = failing  # type: ignore[method-assign, assignment]
    try:
        with refused(ArithmeticError, "only the second process fails"):
            tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer)
    finally:
        Svd.split = split  # type: ignore[method-assign]
    unchanged()
    other = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with refused(tdfx.OptimizerError, "are in none of the optimizers given"):
        tdfx.rewrite(model, HALF, optimizer=other)
    with refused(tdfx.InputError, "does not accept the example inputs"):
        tdfx.rewrite(model, HALF, example_inputs=X[:, :3], optimizer=optimizer)
    unchanged()
    weight = model.blocks[0].up.weight
    kept = weight.to_local().clone()
    with torch.no_grad():
        weight.to_local().view(-1)[: 2 * dist.get_rank()] = float("nan")
    with refused(tdfx.WeightError, "has 2 values that are NaN or infinite"):
        tdfx.rewrite(model, HALF, optimizer=optimizer)
    with torch.no_grad():
        weight.to_local().copy_(kept)
    unchanged()
    train(model, optimizer, 2, parts=True)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer)
    assert any(isinstance(one, Factorized) for one in small.modules())


def check_what_one_process_is_refused_is_raised_on_both(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer, other = SGD(model.parameters(), lr=0.05), SGD(net().parameters(), lr=0.05)
    train(model, optimizer, 1, parts=True)
    second = dist.get_rank() == 1
    before = values(model)
    for call in (tdfx.plan, tdfx.rewrite):
        with two_processes.refused_promptly(tdfx.InputError, "does not accept the example inputs (float64 (4, 3)"):
            call(model, HALF, example_inputs=X[:, :3] if second else X)
    foreign = other if second else optimizer
    with two_processes.refused_promptly(tdfx.OptimizerError, "are in none of the optimizers given"):
        tdfx.rewrite(model, HALF, example_inputs=X, optimizer=foreign)
    with refused(tdfx.ModelError, "processes pass different optimizers, averages or masters"):
        tdfx.rewrite(model, HALF, averaged=None if second else Holder(sharded(mesh=mesh)))
    assert far(values(model), before) == 0.0
    small = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer)
    with two_processes.refused_promptly(tdfx.OptimizerError, "are in none of the optimizers given"):
        tdfx.merge(small, optimizer=foreign)
    train(tdfx.merge(small, optimizer=optimizer), optimizer, 2, parts=True)
    late = sharded(mesh=mesh)
    late.set_requires_gradient_sync(not second)
    if second:
        late._get_fsdp_state()._fsdp_param_group.fsdp_params[0].unsharded_accumulated_grad = torch.ones(2)
        late._get_fsdp_state()._fsdp_param_group.fsdp_params[0]._unsharded_param = nn.Parameter(torch.ones(2))
    with two_processes.refused_promptly(tdfx.ModelError, "holds gradients that were not reduced yet"):
        tdfx.plan(late, HALF)


def check_a_run_in_train_mode_that_fails_on_one_process(mesh: DeviceMesh) -> None:
    class Hidden(Net):
        """Uses its kernel where no graph sees it, and in train mode fails on one process."""

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 10_000:  # what torch.fx cannot follow
                raise ValueError
            if self.training and dist.get_rank() == 1:
                raise ArithmeticError("only the second process, in train mode")
            return super().forward(x)

    model = sharded(Hidden().double(), mesh)
    made = tdfx.plan(model, HALF, example_inputs=X)
    assert made["kernel"].reason == tdfx.Reason.READ_ELSEWHERE
    assert "in train mode the model does not run on the example inputs" in made["kernel"].note
    assert made["first"].factorized


class Holder:
    """Keeps an average in a way of its own: AveragedModel would copy the model, which FSDP2 does not allow."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for one, other in zip(self.module.parameters(), model.parameters(), strict=True):
            one.lerp_(other, 0.1)


def averaged_run(model: Any, average: Any, *, parts: bool) -> list[dict[str, Tensor]]:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []

    def some(current: nn.Module, seed: int) -> None:
        for step in range(3):
            train(current, optimizer, 10 * seed + step, parts=parts, count=1)
            for one in current.modules():
                if isinstance(one, FSDPModule):
                    one.reshard()
            average.update(current)
        found.append(values(average.module))

    some(model, 1)
    for seed, wish in enumerate((HALF, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)), 2):
        model = tdfx.rewrite(model, wish, optimizer=optimizer, averaged=average, emit="modules")
        found.append(values(average.module))
        some(model, seed)
    model = tdfx.merge(model, optimizer=optimizer, averaged=average)
    found.append(values(average.module))
    some(model, 4)
    return found


def check_averages_in_shards_are_those_of_the_single_process_run(mesh: DeviceMesh) -> None:
    average = Holder(sharded(mesh=mesh))
    norm = average.module.blocks[0].norm.weight
    here = averaged_run(sharded(mesh=mesh), average, parts=True)
    there = averaged_run(net(), Holder(net()), parts=False)
    assert all(far(one, other) < 100 * ROUNDING for one, other in zip(here, there, strict=True))
    assert far(here[-1], here[0]) > 1e-3
    assert any(".factors." in name for name in here[1])
    assert average.module.blocks[0].norm.weight is norm, "what is kept is the very same"
    assert issubclass(type(average.module), FSDPModule)
    assert all(isinstance(one, DTensor) for one in average.module.parameters())
    both: list[Any] = [None, None]
    dist.all_gather_object(both, [one.numpy().tobytes() for one in here[-1].values()])
    assert both[0] == both[1]
    assert average.module(X).shape == (4, 5)


def check_an_average_may_be_sharded_otherwise_or_not_at_all(mesh: DeviceMesh) -> None:
    found = []
    plain = Holder(net())
    whole_model: Any = net()
    other = Holder(fully_shard(whole_model, mesh=mesh, reshard_after_forward=False))
    swa = AveragedModel(net())
    fully_shard(swa.module, mesh=mesh)
    for average in (plain, other, swa):
        model = sharded(mesh=mesh)
        small = tdfx.rewrite(model, HALF, averaged=average)
        found.append(values(average.module))
        own = {one.to_local().data_ptr() for one in small.parameters()}  # type: ignore[attr-defined]
        if average is not plain:
            copies: Any = average.module
            assert not own & {one.to_local().data_ptr() for one in copies.parameters()}
    assert far(found[0], found[1]) == far(found[0], found[2]) == 0.0
    assert not any(isinstance(one, DTensor) for one in plain.module.parameters())
    assert isinstance(swa.module, FSDPModule)
    swa.update_parameters(small)
    with refused(tdfx.ModelError, "averaged copy in Holder is not one of this model: 'bias' is (2,)"):
        tdfx.rewrite(sharded(mesh=mesh), HALF, averaged=Holder(nn.Linear(2, 2)))


def check_no_process_ever_holds_an_average(mesh: DeviceMesh) -> None:
    layers = 32

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, average = sharded(Deep().double(), mesh), Holder(sharded(Deep().double(), mesh))
    size = layers * 64 * 64 * 8
    rewriting = Live()
    with rewriting:
        small = tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=1 / 8), min_gain=0), averaged=average)
    assert 0 < rewriting.most < size / 4, rewriting.most / size
    merging = Live()
    with merging:
        tdfx.merge(small, averaged=average)
    assert 0 < merging.most < size / 4, merging.most / size


def check_sites_switch_when_half_of_them_settle(mesh: DeviceMesh) -> None:
    def run(model: nn.Module, parts: bool) -> tuple[tdfx.Switch, list[int], dict[str, Tensor]]:
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        when = tdfx.Settled(every=1, window=2, tolerance=4e-3, moved=1e-4, timeout=14)
        switch = tdfx.Switch(HALF, when=when)
        changed = []
        for step in range(16):
            train(model, optimizer, step, parts=parts, count=1)
            now = switch.step(model, optimizer=optimizer, emit="modules")
            changed += [step] if now is not model else []
            model = now
        return switch, changed, values(model)

    here, changed, found = run(sharded(mesh=mesh), True)
    there, expected, alone = run(net(), False)
    assert here.done
    assert len(here.plan.factorized) == 7  # type: ignore[union-attr]
    assert changed == expected
    assert len(changed) == 1
    assert "sites held within 0.004 over 2 looks" in str(here), "it switches before the timeout"
    assert [(one.step, one.what, one.sites) for one in here.events] == [
        (one.step, one.what, one.sites) for one in there.events
    ]
    assert far(found, alone) < 100 * ROUNDING
    both: list[Any] = [None, None]
    told = [str(here), here.plan.to_json(), [one.numpy().tobytes() for one in found.values()]]  # type: ignore[union-attr]
    dist.all_gather_object(both, told)
    assert both[0] == both[1]


def check_a_switch_weighs_what_is_left(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    switch = tdfx.Switch(HALF, when=tdfx.Settled(every=1, timeout=3), total_steps=3)
    for _ in range(4):
        model = switch.step(model, example_inputs=X)
    assert switch.done
    assert [one.what for one in switch.events] == ["too_late"]
    assert not any(isinstance(one, Factorized) for one in model.modules())


def check_what_is_refused(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model.set_requires_gradient_sync(False)
    model(X).sum().backward()
    with refused(tdfx.ModelError, "holds gradients that were not reduced yet"):
        tdfx.rewrite(model, HALF)
    model = net()
    everything = set(model.parameters())
    fully_shard(model, mesh=mesh, ignored_params=everything)
    with refused(tdfx.ModelError, "none of its parameters are sharded"):
        tdfx.rewrite(model, HALF)
    small: Any = tdfx.rewrite(net(), HALF, emit="modules")
    fully_shard(small.first.factors[0], mesh=mesh)
    fully_shard(small, mesh=mesh)
    with refused(tdfx.ModelError, "which is no module of the model that comes of it"):
        tdfx.merge(small)
    replicated = net()
    try:
        from torch.distributed._composable.replicate_with_fsdp import replicate
    except ImportError:
        pass  # this torch has no such thing
    else:
        replicate(replicated, mesh=mesh)
        with refused(tdfx.ModelError, "ReplicateNet derives from FSDPModule, but was not made by fully_shard"):
            tdfx.rewrite(replicated, HALF)
    parallel = net()
    for name, parameter in list(parallel.last.named_parameters()):
        setattr(parallel.last, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    kept = {one.name: one.reason for one in tdfx.plan(parallel, HALF).sites}
    assert kept["last"] == tdfx.Reason.PARAMETRIZED, "without fully_shard a DTensor stays one"
    assert kept["first"] is None


def check_masters_are_fsdps_own(mesh: DeviceMesh) -> None:
    model = sharded(net().bfloat16(), mesh)
    masters = {one: nn.Parameter(one.detach().float()) for one in model.parameters()}
    before = dict(masters)
    with refused(tdfx.OptimizerError, "FSDP2 has mixed precision of its own, with float32 shards as the masters"):
        tdfx.rewrite(model, HALF, masters=masters)
    with refused(tdfx.OptimizerError, "Shard a float32 model with MixedPrecisionPolicy"):
        tdfx.merge(model, masters=masters)
    assert before.keys() == masters.keys()


def check_gradients_of_kept_parameters_stay(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model(X).sum().backward()
    gradient = model.last.bias.grad
    assert isinstance(gradient, DTensor)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, include=("first",))
    small: Any = tdfx.rewrite(model, policy, optimizer=SGD(model.parameters(), lr=0.1))
    assert small.last.bias.grad is gradient
    dense, (first, last) = whole(model.first.weight.grad), small.first.weights
    assert torch.allclose(whole(first.grad), whole(last).mT @ dense, rtol=0, atol=ROUNDING)


def check_a_site_may_be_a_boundary(mesh: DeviceMesh) -> None:
    model = net()
    fully_shard(model.first, mesh=mesh)
    model.last.bias = None
    fully_shard(model.last, mesh=mesh)
    fully_shard(model, mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    group = small.last._get_fsdp_state()._fsdp_param_group
    assert [one._module_info.module for one in group.fsdp_params] == list(small.last.factors)
    assert type(small.last).__name__ == "FSDPFactorized"
    plain = net()
    plain.last.bias = None
    other = tdfx.rewrite(plain, HALF, example_inputs=X, emit="modules")
    assert torch.equal(small(X), other(X))
    assert type(tdfx.merge(small).last).__name__ == "FSDPLinear"


def check_shapes_smaller_than_the_mesh(mesh: DeviceMesh) -> None:
    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(16, 1), nn.Linear(1, 5)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](torch.tanh(self.blocks[0](x)))  # type: ignore[no-any-return]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Thin().double()

    def optimizer(one: Any) -> Optimizer:
        return AdamW(one, lr=0.01)

    here = whole_run(sharded(make(), mesh), optimizer, parts=True)
    there = whole_run(make(), optimizer, parts=False)
    assert far(here.factorized, there.factorized) < ROUNDING
    assert far(here.merged, there.merged) < ROUNDING
    assert [len(one.to_local()) for one in here.small.parameters() if one.shape[0] == 1] == [  # type: ignore[attr-defined]
        1 - dist.get_rank()
    ] * 4


def check_tied_weights_are_kept(mesh: DeviceMesh) -> None:
    model = net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    fully_shard(model, mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    assert isinstance(small.first, Factorized)
    assert small.blocks[0].up.weight is small.blocks[1].up.weight is model.blocks[0].up.weight
    assert small._tdfx_plan["blocks.0.up"].reason == tdfx.Reason.TIED
    optimizer = SGD(small.parameters(), lr=0.1)
    train(small, optimizer, 1, parts=True)
    assert small.blocks[0].up.weight is small.blocks[1].up.weight


def check_ignored_parameters_stay_plain(mesh: DeviceMesh) -> None:
    model = net()
    fully_shard(model, mesh=mesh, ignored_params={model.first.weight, model.last.bias})
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    plain = {name for name, one in small.named_parameters() if not isinstance(one, DTensor)}
    assert plain == {"first.factors.0.weight", "first.factors.1.weight", "last.factors.1.bias"}
    other = tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")
    assert torch.equal(small(X), other(X))


def check_placements_of_ones_own(mesh: DeviceMesh) -> None:
    def along_columns(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else None

    model = sharded(mesh=mesh, shard_placement_fn=along_columns)
    assert model.first.weight.placements == (Shard(1),)
    assert model.blocks[0].down.weight.placements == (Shard(0),)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, optimizer, 1, parts=True)
    policy = tdfx.Policy(rank=tdfx.Fixed({"*": 7}), min_gain=0, exclude=("last",))
    small: Any = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer)
    assert small.last.weight.placements == (Shard(1),)
    assert small.first.factors[0].weight.placements == (Shard(1),)
    assert small.first.factors[1].weight.placements == (Shard(0),), "seven columns do not divide evenly"
    train(small, optimizer, 2, parts=True)
    dense: Any = tdfx.merge(small, optimizer=optimizer)
    assert dense.first.weight.placements == (Shard(1),)
    train(dense, optimizer, 3, parts=True)
    there = whole_run(net(), lambda one: SGD(one, lr=0.05, momentum=0.9), parts=False, policy=policy)
    assert far(values(dense), there.merged) < ROUNDING


def check_several_modules_in_one_boundary(mesh: DeviceMesh) -> None:
    model = net()
    first, second = model.blocks
    fully_shard([first, second], mesh=mesh)
    fully_shard(model, mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    state = small.blocks[0]._get_fsdp_state()
    assert state is small.blocks[1]._get_fsdp_state()
    assert len(state._fsdp_param_group.fsdp_params) == 2 * len(list(small.blocks[0].parameters()))
    assert torch.equal(small(X), tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")(X))


def check_only_a_part_is_sharded(mesh: DeviceMesh) -> None:
    model = net()
    fully_shard(model.blocks[0], mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    assert type(small).__name__ == "Net"
    assert [isinstance(block, FSDPModule) for block in small.blocks] == [True, False]
    assert not isinstance(small.first.factors[0].weight, DTensor)
    assert torch.equal(small(X), tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")(X))


def check_low_precision(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(net().float(), mesh, mp_policy=policy)
    optimizer = AdamW(model.parameters(), lr=0.01)
    x = X.float()

    def step(one: nn.Module) -> Tensor:
        output: Tensor = one(x)
        output.square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return output

    step(model)
    small = tdfx.rewrite(model, HALF, example_inputs=x, optimizer=optimizer)
    assert step(small).dtype == torch.bfloat16
    assert {one.dtype for one in small.parameters()} == {torch.float32}
    assert step(tdfx.merge(small, optimizer=optimizer)).dtype == torch.bfloat16


def check_ranks_are_lowered(mesh: DeviceMesh) -> None:
    quarter = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)

    def run(model: nn.Module, parts: bool) -> dict[str, Tensor]:
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, optimizer, 1, parts=parts)
        for seed, policy in ((2, HALF), (3, quarter)):
            model = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer, emit="modules")
            train(model, optimizer, seed, parts=parts)
        assert next(one.ranks for one in model._tdfx_plan.factorized) == (4,)  # type: ignore[union-attr]
        return values(model)

    assert far(run(sharded(mesh=mesh), True), run(net(), False)) < ROUNDING


def check_convolutions_and_attention(mesh: DeviceMesh) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv1d(1, 12, 3, padding=1), nn.Conv1d(12, 8, 3, bias=False)])
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x if x.dim() == 3 else x[:, None])
            x = x.mT
            if x.shape[0] > 10_000:  # what torch.fx cannot follow
                raise ValueError
            return self.last(self.attention(x, x, x)[0].mean(1))  # type: ignore[no-any-return]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Mixed().double()

    here = whole_run(sharded(make(), mesh), lambda one: SGD(one, lr=0.05, momentum=0.9), parts=True)
    there = whole_run(make(), lambda one: SGD(one, lr=0.05, momentum=0.9), parts=False)
    assert far(here.factorized, there.factorized) < ROUNDING
    assert far(here.merged, there.merged) < ROUNDING
    plan: Any = here.small._tdfx_plan
    assert plan["attention.out_proj"].reason == tdfx.Reason.READ_ELSEWHERE
    assert plan["blocks.0"].factorized
    assert plan["blocks.0"].flops_before == there.small._tdfx_plan["blocks.0"].flops_before  # type: ignore[index, union-attr]


def check_hooks_of_a_user_stay(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    called: list[str] = []
    model.register_forward_hook(lambda *_: called.append("model"))
    model.first.register_forward_pre_hook(lambda *_: called.append("first"))
    small = tdfx.rewrite(model, HALF)
    small(X)
    assert called == ["first", "model"]
    tdfx.merge(small)(X)
    assert called == ["first", "model"] * 2
    assert len(small._forward_pre_hooks) == len(model._forward_pre_hooks) == 1


def check_checkpoints(mesh: DeviceMesh) -> None:
    folder = Path(sys.argv[1])

    def make() -> tuple[Any, Optimizer]:
        model = sharded(mesh=mesh)
        optimizer = AdamW(model.parameters(), lr=0.01)
        train(model, optimizer, 1, parts=True)
        small = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer)
        return small, optimizer

    model, optimizer = make()
    train(model, optimizer, 2, parts=True)
    weights, states = get_state_dict(model, optimizer)
    assert list(weights) == list(model.state_dict())
    save({"model": weights, "optimizer": states}, checkpoint_id=folder / "checkpoint")
    saved = values(model)
    train(model, optimizer, 3, parts=True)
    expected = values(model)
    other, its_optimizer = make()
    assert far(values(other), saved) > 1e-3
    weights, states = get_state_dict(other, its_optimizer)
    load({"model": weights, "optimizer": states}, checkpoint_id=folder / "checkpoint")
    set_state_dict(other, its_optimizer, model_state_dict=weights, optim_state_dict=states)
    assert far(values(other), saved) == 0.0
    train(other, its_optimizer, 3, parts=True)
    assert far(values(other), expected) == 0.0


def check_nothing_of_the_old_sharding_stays(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model(X)
    state, group = (weakref.ref(one) for one in (model._get_fsdp_state(), model._get_fsdp_state()._fsdp_param_group))
    small = tdfx.rewrite(model, HALF)
    del model
    import gc

    gc.collect()
    assert state() is None
    assert group() is None
    small(X)


def check_a_compiled_model_is_compiled_again(mesh: DeviceMesh) -> None:
    def run(model: nn.Module, parts: bool) -> dict[str, Tensor]:
        compiled: Any = torch.compile(model, backend="eager")
        optimizer = SGD(compiled.parameters(), lr=0.05, momentum=0.9)
        train(compiled, optimizer, 1, parts=parts)
        small: Any = tdfx.rewrite(compiled, HALF, example_inputs=X, optimizer=optimizer, emit="modules")
        assert type(small) is type(compiled)
        train(small, optimizer, 2, parts=parts)
        assert isinstance(small._orig_mod, FSDPModule) == parts
        return values(small)

    assert far(run(sharded(mesh=mesh), True), run(net(), False)) < ROUNDING


def check_blocks_that_are_compiled_in_place_are_so_again(mesh: DeviceMesh) -> None:
    count = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        count[0] += 1
        return graph.forward

    def run(model: Any, parts: bool) -> dict[str, Tensor]:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend=backend)
        if parts:
            model = sharded(model, mesh)
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        train(model, optimizer, 1, parts=parts)
        small: Any = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer, emit="modules")
        before, count[0] = count[0], 0
        assert before > 0
        train(small, optimizer, 2, parts=parts)
        assert count[0] > 0
        assert all(block.__dict__["_compiled_call_impl"] is not None for block in small.blocks)
        return values(small)

    assert far(run(net(), True), run(net(), False)) < ROUNDING


def check_wrapped_parts_in_shards_are_spoken_of(mesh: DeviceMesh) -> None:
    model = net()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    fully_shard(model, mesh=mesh)
    with refused(
        tdfx.ModelError, "Its part 'blocks.0' is wrapped by torch.compile, around or inside of which fully_shard"
    ):
        tdfx.rewrite(model, HALF)


def check_decay_and_penalty_go_on(mesh: DeviceMesh) -> None:
    def run(model: nn.Module, parts: bool) -> dict[str, Tensor]:
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        penalty = tdfx.LowRankPenalty(model, tdfx.plan(model, HALF, example_inputs=X), optimizer, strength=0.1)
        train(model, optimizer, 1, parts=parts)
        penalty.compress()
        train(model, optimizer, 2, parts=parts)
        assert penalty.distance() > 0.1
        penalty.remove()
        small = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer, emit="modules")
        decay = tdfx.FrobeniusDecay(small, optimizer)
        train(small, optimizer, 3, parts=parts)
        decay.remove()
        return values(small)

    assert far(run(sharded(mesh=mesh), True), run(net(), False)) < ROUNDING


def check_attributes_of_a_user_are_spoken_of(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model.first.weight.rate = 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tdfx.rewrite(model, HALF)
    assert [str(one.message)[:32] for one in caught] == ["The weight of site 'first' has h"]


def check_precision_of_single_parameters(mesh: DeviceMesh) -> None:
    if "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__:
        return  # this torch has no such thing
    newer: dict[str, Any] = {"param_dtype_override_fn": lambda one: torch.float32 if one.dim() == 1 else None}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, **newer)
    model = net().float()
    fully_shard(model, mesh=mesh, mp_policy=policy)
    small: Any = tdfx.rewrite(model, HALF)
    group = small._get_fsdp_state()._fsdp_param_group
    found = {len(one.sharded_param.shape): one.mp_policy.param_dtype for one in group.fsdp_params}
    assert found == {1: torch.float32, 2: torch.bfloat16}


def check_a_mesh_for_single_parameters(mesh: DeviceMesh) -> None:
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        return  # this torch has no such thing
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    other: Any = HSDPMeshInfo(hybrid, shard_mesh_dim=1, replicate_mesh_dim=0)
    usual = FSDPMeshInfo(mesh, shard_mesh_dim=0)

    def placed(parameter: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), other if parameter.shape[0] == 33 else usual)

    model = net()
    fully_shard(model, mesh=mesh, shard_placement_fn=placed)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    groups = {group.mesh_info.mesh: group for group in small._get_fsdp_state()._fsdp_param_groups}
    assert {mesh.ndim: len(group.fsdp_params) for mesh, group in groups.items()} == {1: 18, 2: 6}
    assert torch.equal(small(X), tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")(X))
    other = FSDPMeshInfo(hybrid["shard"], shard_mesh_dim=0)
    model = net()
    fully_shard(model, mesh=mesh, shard_placement_fn=placed)
    with refused(tdfx.ModelError, "are sharded over other processes than the rest of the model, [0, 1]"):
        tdfx.rewrite(model, HALF)


def control_a_failure_on_one_process_is_seen(mesh: DeviceMesh) -> None:
    assert dist.get_rank() == 0, "the second process fails"


CHECKS: dict[str, Callable[..., None]] = {
    name: one for name, one in list(globals().items()) if name.startswith(("check_", "control_"))
}

if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), lambda: (init_device_mesh("cpu", (2,)),), CHECKS)

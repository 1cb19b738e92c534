"""Checks that a model in shards which cannot be rewritten is refused on both processes, before anything has changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_averages import Average
from fsdp_runs import HALF, Net, X, adamw, distance, full, net, sharded, train, values
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD
from two_processes import refused, refused_promptly

import tdfx
from tdfx.factors.svd import Svd
from tdfx.layers.factorized import Factorized

NO_OPTIMIZER = "are in none of the optimizers given"


def check_a_failure_changes_nothing(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer = adamw(model.parameters())
    train(model, optimizer, 1, halves=True)
    before, parameters = values(model), list(model.parameters())
    states = [{key: full(value) for key, value in optimizer.state[parameter].items()} for parameter in parameters]

    def assert_unchanged() -> None:
        assert distance(values(model), before) == 0.0
        assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
        assert optimizer.param_groups[0]["params"] == parameters
        for parameter, state in zip(parameters, states, strict=True):
            assert all(torch.equal(full(value), state[key]) for key, value in optimizer.state[parameter].items())

    split = Svd.split

    def failing(*arguments: Any) -> Any:
        if dist.get_rank() == 1:
            raise ArithmeticError("only the second process fails")
        return split(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Svd, "split", failing)
        with refused(ArithmeticError, "only the second process fails"):
            tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer)
    assert_unchanged()
    foreign = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with refused(tdfx.OptimizerError, NO_OPTIMIZER):
        tdfx.rewrite(model, HALF, optimizer=foreign)
    with refused(tdfx.InputError, "does not accept the example inputs"):
        tdfx.rewrite(model, HALF, example_inputs=X[:, :3], optimizer=optimizer)
    assert_unchanged()
    weight = model.blocks[0].up.weight
    shard = weight.to_local().clone()
    with torch.no_grad():
        weight.to_local().view(-1)[: 2 * dist.get_rank()] = float("nan")
    with refused(tdfx.WeightError, "has 2 values that are NaN or infinite"):
        tdfx.rewrite(model, HALF, optimizer=optimizer)
    with torch.no_grad():
        weight.to_local().copy_(shard)
    assert_unchanged()
    train(model, optimizer, 2, halves=True)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer)
    assert any(isinstance(module, Factorized) for module in small.modules())


def check_what_one_process_is_refused_is_raised_on_both(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer, foreign = SGD(model.parameters(), lr=0.05), SGD(net().parameters(), lr=0.05)
    train(model, optimizer, 1, halves=True)
    second = dist.get_rank() == 1
    before = values(model)
    for call in (tdfx.plan, tdfx.rewrite):
        with refused_promptly(tdfx.InputError, "does not accept the example inputs (float64 (4, 3)"):
            call(model, HALF, example_inputs=X[:, :3] if second else X)
    wrong = foreign if second else optimizer
    with refused_promptly(tdfx.OptimizerError, NO_OPTIMIZER):
        tdfx.rewrite(model, HALF, example_inputs=X, optimizer=wrong)
    with refused(tdfx.ModelError, "processes pass different optimizers, averages or masters"):
        tdfx.rewrite(model, HALF, averaged=None if second else Average(sharded(mesh=mesh)))
    assert distance(values(model), before) == 0.0
    small = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer)
    with refused_promptly(tdfx.OptimizerError, NO_OPTIMIZER):
        tdfx.merge(small, optimizer=wrong)
    train(tdfx.merge(small, optimizer=optimizer), optimizer, 2, halves=True)
    accumulating = sharded(mesh=mesh)
    accumulating.set_requires_gradient_sync(not second)
    if second:
        parameter = accumulating._get_fsdp_state()._fsdp_param_group.fsdp_params[0]
        parameter.unsharded_accumulated_grad = torch.ones(2)
        parameter._unsharded_param = nn.Parameter(torch.ones(2))
    with refused_promptly(tdfx.ModelError, "holds gradients that were not reduced yet"):
        tdfx.plan(accumulating, HALF)


def check_a_run_in_train_mode_that_fails_on_one_process(mesh: DeviceMesh) -> None:
    class Hidden(Net):
        """Uses its kernel where no graph sees it, and in train mode fails on one process."""

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 10_000:  # what torch.fx cannot follow
                raise ValueError
            if self.training and dist.get_rank() == 1:
                raise ArithmeticError("only the second process, in train mode")
            return super().forward(x)

    plan = tdfx.plan(sharded(Hidden().double(), mesh), HALF, example_inputs=X)
    assert plan["kernel"].reason == tdfx.Reason.READ_ELSEWHERE
    assert "in train mode the model does not run on the example inputs" in plan["kernel"].note
    assert plan["first"].factorized


def check_models_on_the_meta_device(mesh: DeviceMesh) -> None:
    with torch.device("meta"):
        empty = Net().double()
    model = sharded(empty, mesh)
    with refused(tdfx.WeightError, "is on the meta device and has no values"):
        tdfx.rewrite(model, HALF)
    model.to_empty(device="cpu")
    for path, value in net().state_dict().items():
        owner, _, name = path.rpartition(".")
        parameter = model.get_submodule(owner)._parameters[name]
        parameter.data.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    expected = values(tdfx.rewrite(sharded(mesh=mesh), HALF))
    assert distance(values(tdfx.rewrite(model, HALF)), expected) == 0.0


def check_shardings_that_are_refused(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model.set_requires_gradient_sync(False)
    model(X).sum().backward()
    with refused(tdfx.ModelError, "holds gradients that were not reduced yet"):
        tdfx.rewrite(model, HALF)
    model = net()
    fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()))
    with refused(tdfx.ModelError, "none of its parameters are sharded"):
        tdfx.rewrite(model, HALF)
    small: Any = tdfx.rewrite(net(), HALF, emit="modules")
    fully_shard(small.first.factors[0], mesh=mesh)
    fully_shard(small, mesh=mesh)
    with refused(tdfx.ModelError, "the rewritten model has no such module"):
        tdfx.merge(small)


def check_a_replicated_model_is_refused(mesh: DeviceMesh) -> None:
    try:
        from torch.distributed._composable.replicate_with_fsdp import replicate
    except ImportError:
        return  # this version of torch has no such function
    model = net()
    replicate(model, mesh=mesh)
    with refused(tdfx.ModelError, "ReplicateNet derives from FSDPModule, but was not made by fully_shard"):
        tdfx.rewrite(model, HALF)


def check_a_dtensor_without_fully_shard_is_kept(mesh: DeviceMesh) -> None:
    model = net()
    for name, parameter in list(model.last.named_parameters()):
        setattr(model.last, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    plan = tdfx.plan(model, HALF)
    assert plan["last"].reason == tdfx.Reason.PARAMETRIZED
    assert plan["first"].reason is None


def check_masters_are_refused(mesh: DeviceMesh) -> None:
    model = sharded(net().bfloat16(), mesh)
    masters = {parameter: nn.Parameter(parameter.detach().float()) for parameter in model.parameters()}
    before = dict(masters)
    with refused(tdfx.OptimizerError, "FSDP2 has mixed precision of its own, with float32 shards as the masters"):
        tdfx.rewrite(model, HALF, masters=masters)
    with refused(tdfx.OptimizerError, "Shard a float32 model with MixedPrecisionPolicy"):
        tdfx.merge(model, masters=masters)
    assert before.keys() == masters.keys()


def check_wrapped_parts_in_shards_are_refused(mesh: DeviceMesh) -> None:
    model = net()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    fully_shard(model, mesh=mesh)
    message = "Its part 'blocks.0' is wrapped by torch.compile, around or inside of which fully_shard"
    with refused(tdfx.ModelError, message):
        tdfx.rewrite(model, HALF)


def check_attributes_of_a_parameter_are_warned_of(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model.first.weight.rate = 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tdfx.rewrite(model, HALF)
    assert [str(warning.message)[:32] for warning in caught] == ["The weight of site 'first' has h"]


def control_a_failure_on_one_process_is_seen(mesh: DeviceMesh) -> None:
    assert dist.get_rank() == 0, "the second process fails"

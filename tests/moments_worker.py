"""Checks of Moments on two processes; test_moments_processes.py starts them.

Each function whose name starts with ``check_`` or ``control_`` runs on both processes, with a mesh of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ddp_runs as ddp
import fsdp_runs as fsdp
import torch
import torch.distributed as dist
import two_processes
from ddp_runs import DDP, ROUNDING
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from two_processes import on_both

import tdfx
from tdfx.distributed.ddp import ranks_of
from tdfx.distributed.ranks import Ranks

FSDP_PATHS = ("first.weight", "blocks.0.up.weight", "blocks.1.down.weight", "kernel", "last.weight")
DDP_PATHS = ("0.weight", "3.weight", "5.weight")
Data = Sequence[tuple[Tensor, Tensor]]


def collect(model: Any, data: Data, *, parts: Sequence[int], **settings: Any) -> tdfx.Moments:
    """Train on some halves of each batch, each of which is a unit, and return what was recorded."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with tdfx.Moments(model, _share=1.0, **settings) as moments:
        for x, y in data:
            optimizer.zero_grad()
            for part in parts:
                half = slice(4 * part, 4 * part + 4)
                ((model(x[half]) - y[half]).square().mean() / len(parts)).backward()
            optimizer.step()
    return moments


def values(moments: tdfx.Moments) -> dict[str, Any]:
    state = moments.state_dict()
    return {path: [site["inputs"], site["outputs"], site["rows"]] for path, site in state["sites"].items()}


def assert_averaged(moments: tdfx.Moments, processes: Ranks, single: tdfx.Moments, paths: Sequence[str]) -> None:
    """Assert that the average is what one process records of all halves, and the same bits on both."""
    units = moments.units
    moments.average(processes)
    assert moments.units == units
    assert set(moments.state_dict()["sites"]) == set(paths)
    for path in paths:
        found, expected = moments.of(path), single.of(path)
        assert found is not None
        assert expected is not None
        for value, other in ((found.inputs, expected.inputs), (found.outputs, expected.outputs)):
            assert value is not None
            assert other is not None
            assert (value - other).abs().max() < ROUNDING * other.abs().max(), path
        assert 2 * found.samples == expected.samples
    first, second = on_both(values(moments))
    assert str(first) == str(second)
    assert all(torch.equal(a, b) for path in paths for a, b in zip(first[path][:2], second[path][:2], strict=True))
    before = values(moments)
    moments.average(processes)
    assert all(torch.equal(values(moments)[path][0], before[path][0]) for path in paths), (
        "an average is its own average"
    )


def check_replicas_are_averaged(_: DeviceMesh) -> None:
    data = list(ddp.batches(1, 3))
    wrapped = DDP(ddp.net())
    moments = collect(wrapped, data, parts=[dist.get_rank()])
    assert moments.units == 3
    assert_averaged(moments, ranks_of(wrapped), collect(ddp.net(), data, parts=[0, 1]), DDP_PATHS)


def check_compiled_replicas_are_recorded(_: DeviceMesh) -> None:
    data = list(ddp.batches(1, 2))
    single = collect(ddp.net(), data, parts=[0, 1])
    for build in (
        lambda: torch.compile(DDP(ddp.net()), backend="eager"),
        lambda: DDP(torch.compile(ddp.net(), backend="eager")),
    ):
        torch._dynamo.reset()
        wrapped: Any = build()
        ranks = Ranks([dist.group.WORLD], "cpu")  # type: ignore[list-item]
        assert_averaged(collect(wrapped, data, parts=[dist.get_rank()]), ranks, single, DDP_PATHS)


def control_moments_that_are_not_averaged_differ(_: DeviceMesh) -> None:
    moments = collect(DDP(ddp.net()), list(ddp.batches(1, 2)), parts=[dist.get_rank()])
    first, second = on_both(values(moments)["0.weight"][0])
    assert torch.equal(first, second)


def check_training_replicas_is_the_same_with_and_without(_: DeviceMesh) -> None:
    states = []
    for attached in (False, True):
        wrapped = DDP(ddp.net())
        moments = tdfx.Moments(wrapped) if attached else None
        ddp.train(wrapped, ddp.sgd(wrapped.parameters()), 1)
        states.append([value.numpy().tobytes() for value in wrapped.state_dict().values()])
    assert states[0] == states[1]
    assert moments is not None
    assert moments.units == 4


def check_shards_are_averaged(mesh: DeviceMesh) -> None:
    data = list(fsdp.batches(1, 3))
    single = collect(fsdp.net(), data, parts=[0, 1])
    for reshard in (True, False):
        model = fsdp.sharded(mesh=mesh, reshard_after_forward=reshard)
        moments = collect(model, data, parts=[dist.get_rank()])
        assert_averaged(moments, Ranks.of_mesh(mesh), single, list(single.state_dict()["sites"]))
        assert all(moments.of(path) is not None for path in FSDP_PATHS)


def check_training_shards_is_the_same_with_and_without(mesh: DeviceMesh) -> None:
    states = []
    for attached in (False, True):
        model = fsdp.sharded(mesh=mesh)
        moments = tdfx.Moments(model) if attached else None
        fsdp.train(model, fsdp.adamw(model.parameters()), 1, halves=True)
        states.append([value.numpy().tobytes() for value in fsdp.values(model).values()])
    assert states[0] == states[1]
    assert moments is not None
    assert moments.units == 3


def check_a_layer_that_is_sharded_by_itself_in_mixed_precision(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = fsdp.net().float()
    for part in (model.first, model.last, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    moments = collect(model, [(x.float(), y.float()) for x, y in fsdp.batches(1, 2)], parts=[dist.get_rank()])
    assert moments.units == 2
    for path in FSDP_PATHS:
        found = moments.of(path)
        assert found is not None
        assert found.inputs is not None
        assert found.inputs.dtype == torch.float32
        assert found.inputs.isfinite().all()


def check_a_factorized_model_in_shards_keeps_its_paths(mesh: DeviceMesh) -> None:
    data = list(fsdp.batches(1, 2))
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
    single = tdfx.rewrite(fsdp.net(), policy, example_inputs=fsdp.X, emit="modules")
    small = tdfx.rewrite(fsdp.sharded(mesh=mesh), policy, example_inputs=fsdp.X, emit="modules")
    expected = collect(single, data, parts=[0, 1])
    moments = collect(small, data, parts=[dist.get_rank()])
    assert_averaged(moments, Ranks.of_mesh(mesh), expected, list(expected.state_dict()["sites"]))
    assert all(moments.of(path) is not None for path in FSDP_PATHS)


class Experts(nn.Module):
    """The second layer is called on the first process only, and the third on none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        y = y + self.layers[1](x) if dist.get_rank() == 0 else y
        return y + self.layers[2](x[:0]).sum()  # type: ignore[no-any-return]


def check_a_site_that_one_process_lacks_is_averaged_over_the_other(_: DeviceMesh) -> None:
    torch.manual_seed(0)
    model: Any = DDP(Experts(), find_unused_parameters=True)
    torch.manual_seed(dist.get_rank())
    with tdfx.Moments(model, _share=1.0) as moments:
        model(torch.randn(5, 6)).square().mean().backward()
    before = moments.of("layers.1.weight")
    assert (before is not None) == (dist.get_rank() == 0)
    moments.average(ranks_of(model))
    after = moments.of("layers.1.weight")
    assert after is not None
    assert after.inputs is not None
    first, second = on_both(None if before is None else before.inputs)
    assert second is None
    torch.testing.assert_close(after.inputs, first)
    assert moments.of("layers.2.weight") is None


CHECKS: dict[str, Callable[..., None]] = {
    name: check
    for name, check in list(globals().items())
    if name.startswith(("check_", "control_")) and getattr(check, "__module__", "") == __name__
}

if __name__ == "__main__":
    two_processes.run(Path(sys.argv[1]), lambda: (init_device_mesh("cpu", (2,)),), CHECKS)

"""Moments: the values, computed here in float64 from all rows, and a training that is the same bits with and without."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tdfx
import tdfx.layers.copying
from tdfx.distributed.processes import Solo
from tdfx.factors.moments import LARGEST_SIDE, sample_rows, second_moment
from tdfx.passes.analysis.sandbox import random_states

Rows = list[tuple[np.ndarray, np.ndarray]]


class Net(nn.Module):
    """Convolutions of several kinds, a ReLU in place, dropout, and a linear map over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = F.relu(self.norm(self.up(self.grouped(x))), inplace=True)
        x = F.relu(self.mix(x.flatten(2).mT), inplace=True)
        return self.head(F.dropout(x, 0.2, self.training).mean(1))  # type: ignore[no-any-return]


LAYERS = {"first": 1, "grouped": 2, "up": 3, "mix": 1, "head": 1}
"""Layer of ``Net`` -> its groups."""


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = (6, 3, 9, 7), (6, 4)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes) for _ in range(count)]  # type: ignore[misc]


def net(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return Net().to(dtype)


def train(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], *, lr: float = 0.05) -> list[float]:
    """Train as a user does; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rows_of(x: Tensor, layer: nn.Module) -> np.ndarray:
    values = x.detach().double().numpy()
    values = values if isinstance(layer, nn.Linear) else np.moveaxis(values, 1, -1)
    return values.reshape(-1, values.shape[-1])


@contextmanager
def all_rows(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Rows]]:
    """Record all rows of the inputs and output gradients of some layers, call by call."""
    record: dict[str, Rows] = {name: [] for name in names}

    def watch(name: str, layer: Any) -> Any:
        forward = type(layer).forward

        def run(x: Tensor) -> Tensor:
            output = forward(layer, x)
            if output.requires_grad:
                rows = rows_of(x, layer)
                output = output.clone()  # so that nothing in place reaches the tensor that is watched
                output.register_hook(lambda gradient: record[name].append((rows, rows_of(gradient, layer))))
            return output  # type: ignore[no-any-return]

        return run

    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.forward = watch(name, layer)
    yield record
    for layer in layers.values():
        del layer.forward


def reference(calls: Rows, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both moments, each call being a unit of its own."""
    rows = sum(len(x) for x, _ in calls)
    inputs, outputs = np.zeros(()), np.zeros(())
    for x, gradient in calls:
        inputs = inputs + blocks(x, groups) / rows
        moment = blocks(gradient, groups)
        mean = np.mean([np.diag(block).mean() for block in moment])
        outputs = outputs + moment / mean * len(x) / rows
    return inputs, outputs


def blocks(rows: np.ndarray, groups: int) -> np.ndarray:
    return np.stack([part.T @ part for part in np.split(rows, groups, axis=1)])


def assert_moments(moments: tdfx.Moments, record: dict[str, Rows], tolerance: float, groups: Any = LAYERS) -> None:
    for name, calls in record.items():
        assert calls
        found = moments.of(f"{name}.weight")
        assert found is not None
        assert found.samples == sum(len(x) for x, _ in calls)
        for value, expected in zip((found.inputs, found.outputs), reference(calls, groups[name]), strict=True):
            assert value is not None
            assert value.shape == expected.shape
            error = np.abs(value.double().numpy() - expected).max() / np.abs(expected).max()
            assert error < tolerance, (name, error)


def run_twice(
    train_once: Callable[[nn.Module], list[float]], build: Callable[[], Any] = net
) -> tuple[Any, tdfx.Moments]:
    """Train with and without Moments; assert the same bits of losses, parameters, buffers and random generators."""
    results: list[Any] = []
    moments = None
    for attached in (False, True):
        model = build()
        torch.manual_seed(1)
        if attached:
            moments = tdfx.Moments(model, _share=1.0)
        losses = train_once(model)
        state = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
        results.append((losses, state, torch.get_rng_state().numpy().tobytes(), random.getstate()))
    assert results[0] == results[1]
    assert moments is not None
    moments.remove()
    return model, moments


def test_the_moments_are_those_of_all_rows() -> None:
    model = net(torch.float64)
    data = batches(3, torch.float64)
    moments = tdfx.Moments(model, _share=1.0)
    # An own forward on a layer makes it another's, so the reference watches a copy that takes the same steps.
    other = copy.deepcopy(model)
    train(model.eval(), data)
    with all_rows(other, list(LAYERS)) as record:
        train(other.eval(), data)
    assert moments.units == 3
    assert_moments(moments, record, 1e-13)
    found = moments.of("grouped.weight")
    assert found is not None
    assert found.inputs is not None
    assert found.inputs.dtype == torch.float64
    assert found.inputs.shape == (2, 4, 4)
    assert moments.of("norm.weight") is None
    assert moments.of("nothing") is None


def test_a_wrong_reference_is_seen() -> None:
    model, other = net(torch.float64), net(torch.float64)
    moments = tdfx.Moments(model, _share=1.0)
    train(model.eval(), batches(3, torch.float64))
    with all_rows(other, ["mix"]) as record:
        train(other.eval(), batches(3, torch.float64), lr=0.06)
    with pytest.raises(AssertionError):
        assert_moments(moments, record, 1e-13)


def test_training_is_the_same_bits_with_dropout_and_operations_in_place() -> None:
    _, moments = run_twice(lambda model: train(model, batches(4)))
    assert moments.units == 4


def test_a_training_that_differs_is_seen() -> None:
    rates = iter((0.05, 0.051))
    with pytest.raises(AssertionError):
        run_twice(lambda model: train(model, batches(2), lr=next(rates)))


def test_under_autocast_products_are_in_float32() -> None:
    def train_once(model: nn.Module) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            return train(model, batches(3))

    _, moments = run_twice(train_once)
    found = moments.of("mix.weight")
    assert found is not None
    assert found.inputs is not None
    assert found.inputs.dtype == torch.float32
    # The products of bfloat16 numbers, summed in float32; in bfloat16 they would be no closer to float64 than 1e-3.
    model, other = net(), net()
    moments = tdfx.Moments(model.eval(), _share=1.0)
    train_once(model)
    with all_rows(other.eval(), ["mix"]) as record:
        train_once(other)
    assert_moments(moments, record, 1e-5)


def test_accumulated_gradients_are_units_of_their_own() -> None:
    def accumulate(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index, (x, y) in enumerate(batches(4)):
            ((model(x) - y).square().mean() / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.sum().item() for parameter in model.parameters()]

    _, moments = run_twice(accumulate)
    assert moments.units == 4


def test_the_scale_of_the_loss_does_not_matter() -> None:
    def moments_at(scale: float) -> tdfx.Moments:
        model = net().eval()
        with tdfx.Moments(model, _share=1.0) as moments:
            for x, y in batches(2):
                ((model(x) - y).square().mean() * scale).backward()
        return moments

    plain, scaled = moments_at(1.0), moments_at(2.0**16)
    for name in LAYERS:
        one, other = plain.of(f"{name}.weight"), scaled.of(f"{name}.weight")
        assert one is not None
        assert other is not None
        assert one.outputs is not None
        assert other.outputs is not None
        assert torch.equal(one.outputs, other.outputs)
        assert one.outputs.diagonal(dim1=1, dim2=2).mean() == pytest.approx(1.0, rel=1e-5)


def test_a_unit_with_infinite_gradients_is_left_out() -> None:
    model = net().eval()
    moments = tdfx.Moments(model)
    (x, y), (other_x, other_y) = batches(2)
    ((model(x) - y).square().mean() * math.inf).backward()
    assert moments.units == 0
    assert moments.of("head.weight") is None
    (model(other_x) - other_y).square().mean().backward()
    assert moments.units == 1
    assert moments.nonfinite == {f"{name}.weight": 1 for name in LAYERS}
    assert len(moments.batches) == 1
    assert torch.equal(moments.batches[0][0][0], other_x)


def test_only_the_sites_with_infinite_values_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    moments = tdfx.Moments(model)
    hidden = model[0](torch.randn(8, 4))
    model[1](hidden.detach() * math.nan).sum().backward()
    hidden.sum().backward()
    assert moments.units == 1
    assert moments.of("0.weight") is not None
    assert moments.of("1.weight") is None
    assert dict(moments.nonfinite) == {"1.weight": 1}


def test_validation_and_frozen_parts_are_not_recorded() -> None:
    model = net()
    model.first.requires_grad_(False)
    moments = tdfx.Moments(model)
    (x, y), *_ = batches(1)
    (model(x) - y).square().mean().backward()
    with torch.no_grad():
        model(x * 100)
    with torch.inference_mode():
        model(x * 100)
    assert moments.units == 1
    assert moments.of("first.weight") is None
    assert moments.of("grouped.weight") is not None
    assert len(moments.batches) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_checkpointed_blocks_count_once(reentrant: bool, root: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(F.relu(self.first(x), inplace=True))
            return checkpoint(self.rest, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

        def rest(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.up(x)), inplace=True)
            x = F.relu(self.mix(x.flatten(2).mT), inplace=True)
            return self.head(F.dropout(x, 0.2, self.training).mean(1))  # type: ignore[no-any-return]

    def build() -> Any:
        torch.manual_seed(0)
        return (Net() if root else Checkpointed()).double().eval()

    def train_once(model: nn.Module) -> list[float]:
        call: Any = (lambda x: checkpoint(model, x, use_reentrant=reentrant)) if root else model
        losses = []
        for x, y in batches(3, torch.float64):
            loss = (call(x.requires_grad_()) - y).square().mean()
            loss.backward()
            losses.append(loss.item())
        return losses

    _, moments = run_twice(train_once, build)
    other = net(torch.float64).eval()
    with all_rows(other, list(LAYERS)) as record:
        for x, y in batches(3, torch.float64):
            (other(x) - y).square().mean().backward()
    assert moments.units == 3
    assert_moments(moments, record, 1e-13)
    assert len(moments.batches) == 3


def test_a_selective_checkpoint_is_not_disturbed() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def keep_some(context: Any, operation: Any, *args: Any, **named: Any) -> CheckpointPolicy:
        products = {torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default}
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            contexts = partial(create_selective_checkpoint_contexts, keep_some)
            return checkpoint(self.body, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    def build() -> Any:
        torch.manual_seed(0)
        return Checkpointed()

    data = [(torch.randn(6, 4), torch.randn(6, 4)) for _ in range(3)]
    _, moments = run_twice(lambda model: train(model, data), build)
    found = moments.of("body.0.weight")
    assert found is not None
    assert found.samples == 18


class Scaled(nn.Linear):
    """A layer that is no stock layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2


class Functional(nn.Module):
    """Parameters of its own that functions take, a layer called twice, and a layer with its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3) / 3)
        self.matrix = nn.Parameter(torch.randn(5, 6) / 3)
        self.scaled = Scaled(5, 5)
        self.twice = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.kernel, groups=2, padding=1)
        x = F.linear(x.mT, weight=self.matrix)
        return self.twice(torch.tanh(self.twice(self.scaled(x))))  # type: ignore[no-any-return]


def functional() -> Any:
    torch.manual_seed(0)
    return Functional().double()


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 6, 9, dtype=torch.float64, generator=generator) for _ in range(2)]


def functional_moments(model: Any) -> tdfx.Moments:
    with tdfx.Moments(model, _share=1.0) as moments:
        for x in sequences():
            model(x).square().mean().backward()
    return moments


def test_functions_on_parameters_are_sites() -> None:
    model = functional()
    moments = functional_moments(model)
    record: dict[str, Rows] = {"kernel": [], "matrix": [], "scaled.weight": []}
    twice: Rows = []
    for batch in sequences():
        outputs = [F.conv1d(batch, model.kernel, groups=2, padding=1)]
        outputs.append(F.linear(outputs[0].mT, model.matrix))
        outputs.append(F.linear(outputs[1], model.scaled.weight, model.scaled.bias))
        outputs.append(model.twice(outputs[2] * 2))
        outputs.append(model.twice(torch.tanh(outputs[3])))
        conv, linear, scaled, first, second = torch.autograd.grad(outputs[-1].square().mean(), outputs)
        inputs = [np.moveaxis(batch.numpy(), 1, 2).reshape(-1, 6), *(rows_of(y, model.twice) for y in outputs[1:4])]
        record["kernel"].append((inputs[0], np.moveaxis(conv.numpy(), 1, 2).reshape(-1, 6)))
        record["matrix"].append((rows_of(outputs[0].mT, model.twice), rows_of(linear, model.twice)))
        record["scaled.weight"].append((inputs[1], rows_of(scaled, model.twice)))
        rows = (rows_of(outputs[2] * 2, model.twice), rows_of(torch.tanh(outputs[3]), model.twice))
        gradients = (rows_of(first, model.twice), rows_of(second, model.twice))
        twice.append((np.concatenate(rows), np.concatenate(gradients)))
    record["twice.weight"] = twice
    for path, calls in record.items():
        found = moments.of(path)
        assert found is not None, path
        assert found.samples == sum(len(rows) for rows, _ in calls)
        for value, expected in zip(
            (found.inputs, found.outputs), reference(calls, 2 if path == "kernel" else 1), strict=True
        ):
            assert value is not None
            np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    assert moments.of("unused.weight") is None


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_factorized_site_keeps_its_path(emit: Literal["graph", "modules"]) -> None:
    model = functional()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
    example = torch.randn(4, 6, 9, dtype=torch.float64)
    small = tdfx.rewrite(model, policy, example_inputs=example, emit=emit)
    factorized = {path for path, part in small.named_modules() if isinstance(part, tdfx.Factorized)}
    assert factorized >= {"matrix", "twice"}
    expected, moments = functional_moments(model), functional_moments(small)
    assert moments.state_dict()["sites"].keys() == expected.state_dict()["sites"].keys()
    for path in ("kernel", "matrix", "scaled.weight", "twice.weight"):
        old, new = expected.of(path), moments.of(path)
        assert old is not None
        assert new is not None
        torch.testing.assert_close(new.inputs, old.inputs)
        torch.testing.assert_close(new.outputs, old.outputs)


def test_only_a_model_with_functional_sites_needs_a_mode() -> None:
    modes: list[int] = []
    layer = nn.Linear(5, 5)
    layer.register_forward_hook(lambda *_: modes.append(torch._C._len_torch_function_stack()))
    plain = nn.Sequential(layer)
    with tdfx.Moments(plain):
        plain(torch.randn(2, 5))
    model = functional().float()
    model.scaled = layer
    with tdfx.Moments(model):
        model(torch.randn(4, 6, 9))
    assert modes == [0, 1]


def test_a_method_other_than_forward_opens_a_unit() -> None:
    class Encoder(Net):
        def encode(self, x: Tensor) -> Tensor:
            return self.grouped(self.first(x))  # type: ignore[no-any-return]

    model = Encoder()
    moments = tdfx.Moments(model)
    for x, _ in batches(3):
        model.encode(x).square().mean().backward()
    assert moments.units == 3
    assert moments.batches == []


def test_two_forwards_before_one_backward_are_two_units() -> None:
    model = net()
    moments = tdfx.Moments(model)
    (x, y), (other, _) = batches(2)
    ((model(x) - model(other)) - y).square().mean().backward()
    assert moments.units == 2
    assert [args[0].data_ptr() for args, _ in moments.batches] == [x.data_ptr(), other.data_ptr()]


def test_units_without_gradients_are_dropped() -> None:
    model = net()
    moments = tdfx.Moments(model)
    (x, y), *_ = batches(1)
    late, too_late = model(x), model(x)
    del late
    for _ in range(9):
        model(x)
    (too_late - y).square().mean().backward()
    assert moments.units == 0
    kept = model(x)
    for _ in range(8):
        model(x)
    (kept - y).square().mean().backward()
    assert moments.units == 1


def test_the_last_batches_are_kept_without_copies() -> None:
    class Named(Net):
        def forward(self, x: Tensor, scale: Any = None) -> Tensor:
            return super().forward(x) * (1 if scale is None else scale["by"])

    model = Named()
    moments = tdfx.Moments(model)
    data = batches(10)
    for x, y in data:
        (model(x.requires_grad_(), scale={"by": 2}) - y).square().mean().backward()
    assert moments.units == 10
    assert len(moments.batches) == 8
    for (x, _), (args, named) in zip(data[2:], moments.batches, strict=True):
        assert args[0].data_ptr() == x.data_ptr()
        assert not args[0].requires_grad
        assert named == {"scale": {"by": 2}}


def test_an_error_in_forward_leaves_nothing_behind() -> None:
    class Fails(Functional):
        error: type[BaseException] | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.error is not None:
                raise self.error
            return super().forward(x)

    model = Fails().double()
    x = torch.randn(4, 6, 9, dtype=torch.float64)
    moments = tdfx.Moments(model)
    for error in (ValueError, KeyboardInterrupt):
        model.error = error
        with pytest.raises(error):
            model(x)
        model.error = None
        model(x).sum().backward()
        assert torch._C._len_torch_function_stack() == 0
    assert moments.units == 2
    model.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        model(x)
    moments.remove()
    assert torch._C._len_torch_function_stack() == 0


def hook_count(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_remove_takes_all_hooks_off_and_keeps_what_was_recorded() -> None:
    model = net()
    user = model.first.register_forward_hook(lambda *_: None)
    with tdfx.Moments(model) as moments:
        assert hook_count(model) > 1
        train(model, batches(2))
    moments.remove()
    assert hook_count(model) == 1
    train(model, batches(2))
    assert moments.units == 2
    user.remove()


def test_gradients_that_come_after_the_removal_count() -> None:
    model = net()
    (x, y), *_ = batches(1)
    with tdfx.Moments(model) as moments:
        loss = (model(x) - y).square().mean()
    loss.backward()
    assert moments.units == 1


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, saved_and_loaded, tdfx.layers.copying.structural_copy],
    ids=["deepcopy", "save", "structural"],
)
def test_a_copy_of_the_model_feeds_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    moments = tdfx.Moments(model)
    train(model, batches(1))
    other = copied(model)
    train(other, batches(3))
    assert moments.units == 1
    train(model, batches(1))
    assert moments.units == 2
    own = tdfx.Moments(other)
    train(other, batches(1))
    assert own.units == 1
    assert moments.units == 2


def test_a_hook_survives_its_owner() -> None:
    import gc

    model = net()
    tdfx.Moments(model)
    gc.collect()
    train(model, batches(1))
    (hook, *_) = model.first._forward_hooks.values()
    assert hook.owner() is None
    assert pickle.loads(pickle.dumps(hook)).owner is None


def test_the_output_of_a_layer_can_be_pickled() -> None:
    model = net()
    with tdfx.Moments(model):
        output = model.head(torch.randn(2, 10))
    assert torch.equal(pickle.loads(pickle.dumps(output.detach())), output.detach())


@pytest.mark.parametrize("shape", [(300,), (4, 75), (3, 10, 10), (2, 5, 6, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sampled_rows_are_rows(shape: tuple[int, ...], channels_last: bool) -> None:
    rows, channels = math.prod(shape), 7
    x = torch.arange(rows * channels).view(*shape, channels)
    dim = -1 if channels_last else -len(shape)
    x = x.movedim(-1, dim).contiguous() if len(shape) > 1 else x
    dim = dim if len(shape) > 1 else -1
    assert torch.equal(sample_rows(x, dim, 1.0, 3).sort(0).values, torch.arange(rows * channels).view(rows, channels))
    sampled = sample_rows(x, dim, 0.01, 0)
    assert torch.equal(sampled[:, 0] % channels, torch.zeros(len(sampled), dtype=torch.long))
    assert torch.equal(sampled - sampled[:, :1], torch.arange(channels).expand(len(sampled), channels))
    assert len(set(sampled[:, 0].tolist())) == len(sampled) == rows


def test_about_a_sixteenth_of_the_rows_is_sampled_from_all_columns() -> None:
    x = torch.arange(64 * 32 * 32, dtype=torch.float32).view(64, 1, 32, 32)
    samples = [sample_rows(x, -3, 1 / 16, turn)[:, 0].long() for turn in range(8)]
    for sample in samples:
        assert len(x.flatten()) / 16 <= len(sample) < len(x.flatten()) / 14
        assert len(set((sample % 32).tolist())) == 32
        assert len(set((sample // 32 % 32).tolist())) == 32
    assert len(set(torch.cat(samples).tolist())) == sum(map(len, samples))


@pytest.mark.parametrize(("rows", "sampled"), [(0, 0), (1, 1), (255, 255), (256, 256), (1000, 334), (64 * 256, 1093)])
def test_few_rows_are_all_sampled(rows: int, sampled: int) -> None:
    assert len(sample_rows(torch.zeros(rows, 3), -1, 1 / 16, 0)) == sampled
    assert sample_rows(torch.zeros(3), -1, 1 / 16, 0).shape == (1, 3)


def test_a_sample_copies_only_its_rows() -> None:
    sizes: list[int] = []
    address = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != address:
                sizes.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    x = torch.zeros(64, 8, 32, 32)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        address = y.untyped_storage().data_ptr()
        with Sizes():
            sample_rows(y, -3, 1 / 16, 1)
        assert x.numel() / 17 < max(sizes) < x.numel() / 14
        sizes.clear()


def test_sampled_moments_are_near_those_of_all_rows() -> None:
    torch.manual_seed(3)
    mixing = torch.randn(6, 6)
    errors = []
    for share in (1 / 16, 1.0):
        model = nn.Conv2d(6, 6, 1)
        moments = tdfx.Moments(model, _share=share)
        x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(32, 6, 32, 32))
        (model(x) * torch.randn(32, 6, 32, 32)).sum().backward()
        found = moments.of("weight")
        assert found is not None
        assert found.inputs is not None
        errors.append(float((found.inputs[0] - mixing @ mixing.mT).norm() / (mixing @ mixing.mT).norm()))
    # The error of a second moment of n normal rows is about sqrt(channels / n): of 2,100 rows 0.05, of 32,768 rows 0.014.
    assert errors[1] < 0.03
    assert errors[0] < 0.12


def test_a_long_side_has_a_diagonal_only() -> None:
    rows = torch.randn(5, LARGEST_SIDE + 1, dtype=torch.float64)
    torch.testing.assert_close(second_moment(rows, 1), rows.square().sum(0, keepdim=True))
    assert second_moment(torch.randn(5, 2 * LARGEST_SIDE), 2).shape == (2, LARGEST_SIDE, LARGEST_SIDE)
    model = nn.Linear(4, LARGEST_SIDE + 1)
    moments = tdfx.Moments(model)
    model(torch.randn(3, 4)).square().mean().backward()
    found = moments.of("weight")
    assert found is not None
    assert found.inputs is not None
    assert found.outputs is not None
    assert (found.inputs.shape, found.outputs.shape) == ((1, 4, 4), (1, LARGEST_SIDE + 1))
    assert float(found.outputs.mean()) == pytest.approx(1.0, rel=1e-5)


def test_other_rows_are_sampled_in_each_unit_and_no_random_numbers_are_drawn() -> None:
    model = nn.Linear(1, 1)
    moments = tdfx.Moments(model)
    x = torch.arange(64 * 256.0).unsqueeze(1)
    sums = []
    for _ in range(2):
        before = random_states()
        model(x).sum().backward()
        found = moments.of("weight")
        assert found is not None
        assert found.inputs is not None
        sums.append(found.inputs.item())
        assert random_states() == before
    assert sums[0] != sums[1]


def test_a_resumed_collection_goes_on() -> None:
    data = batches(4)
    whole, model = net().eval(), net().eval()
    expected = tdfx.Moments(whole, _share=1.0)
    train(whole, data, lr=0.0)
    first = tdfx.Moments(model, _share=1.0)
    train(model, data[:2], lr=0.0)
    first.remove()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = tdfx.Moments(model, _share=1.0)
    second.load_state_dict(torch.load(file))
    assert second.units == 2
    train(model, data[2:], lr=0.0)
    assert second.units == 4
    for name in LAYERS:
        old, new = expected.of(f"{name}.weight"), second.of(f"{name}.weight")
        assert old is not None
        assert new is not None
        torch.testing.assert_close(new.inputs, old.inputs)
        torch.testing.assert_close(new.outputs, old.outputs)
        assert new.samples == old.samples


def test_a_saved_state_does_not_change_later() -> None:
    model = net()
    moments = tdfx.Moments(model)
    train(model, batches(1))
    state = moments.state_dict()
    before = copy.deepcopy(state)
    train(model, batches(1))
    assert moments.units == 2
    assert state["units"] == before["units"]
    for path, site in state["sites"].items():
        assert torch.equal(site["inputs"], before["sites"][path]["inputs"])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = net()
    moments = tdfx.Moments(model)
    train(model, batches(1))
    other = nn.Sequential(nn.Linear(4, 4))
    foreign = tdfx.Moments(other)
    other(torch.randn(2, 4)).sum().backward()
    message = (
        r"moments of '0.weight', and the model has no such weight. Nearest: .*weight'.* Load it for the model that"
    )
    with pytest.raises(tdfx.CheckpointError, match=message):
        moments.load_state_dict(foreign.state_dict())
    for state in ({}, {"units": 1}, {"units": 1, "sites": {"first.weight": {}}}, [1]):
        with pytest.raises(tdfx.CheckpointError, match=r"This is no state of tdfx.Moments .* Pass what state_dict"):
            moments.load_state_dict(state)  # type: ignore[arg-type]
    assert moments.units == 1
    assert moments.of("first.weight") is not None


def test_arguments_are_checked() -> None:
    with pytest.raises(
        tdfx.ModelError, match=r"model is a list, not a torch.nn.Module. Pass the module that you train"
    ):
        tdfx.Moments([])  # type: ignore[arg-type]
    with pytest.raises(
        tdfx.PolicyError, match="steps=0 is not a whole number of at least 1: it is about how many training"
    ):
        tdfx.Moments(net(), steps=0)


def test_the_only_process_averages_with_nobody() -> None:
    model = net()
    moments = tdfx.Moments(model)
    train(model, batches(2))
    before = moments.state_dict()
    moments.average(Solo())
    after = moments.state_dict()
    assert after["units"] == before["units"] == 2
    assert list(after["sites"]) == list(before["sites"])
    for path, site in after["sites"].items():
        assert torch.equal(site["inputs"], before["sites"][path]["inputs"])
        assert site["rows"] == before["sites"][path]["rows"]

"""Moments in a training loop: the same bits with and without, which passes count, and copies of the model."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from moments_runs import (
    LAYERS,
    Functional,
    Net,
    all_rows,
    assert_moments,
    batches,
    net,
    run_twice,
    train,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tdfx
import tdfx.layers.copying


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


def test_a_gradient_scaler_skips_the_same_steps() -> None:
    def train_once(model: nn.Module) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-110)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
        for x, y in batches(4):
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().sum() * 1e4).backward()
            scaler.step(optimizer)
            scaler.update()
        return [scaler.get_scale()]

    _, moments = run_twice(train_once)
    assert moments.units == 3
    assert set(moments.nonfinite.values()) == {1}


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
            return checkpoint(self.rest, x, use_reentrant=reentrant)

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


def test_a_method_other_than_forward_opens_a_unit() -> None:
    class Encoder(Net):
        def encode(self, x: Tensor) -> Any:
            return self.grouped(self.first(x))

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

"""Factors that were altered since the rewrite are not merged, and the dense weight of factors cannot be written to."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import tdfx
from tdfx.layers.alterations import alteration_of
from tdfx.layers.joined import JoinedWeight

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)


class Kernel(nn.Module):
    """Passes a parameter of its own to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel)


def rewritten() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), Kernel())
    return tdfx.rewrite(model, HALF, emit="modules")


class Adapter(nn.Module):
    """Adds a low-rank map to a layer."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.base_layer(x) + self.up(self.down(x)))


class Doubled(nn.Sequential):
    """Computes something else than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", 2 * super().forward(x))  # type: ignore[no-untyped-call]


def adapter(layer: Any) -> None:
    layer.factors[0] = Adapter(layer.factors[0])


def activation(layer: Any) -> None:
    layer.factors.insert(1, nn.Tanh())


def other_container(layer: Any) -> None:
    layer.factors = Doubled(*layer.factors)


def pruned(layer: Any) -> None:
    prune.l1_unstructured(layer.factors[1], "weight", amount=0.5)  # type: ignore[no-untyped-call]


def weight_norm(layer: Any) -> None:
    parametrizations.weight_norm(layer.factors[0])


def forward_hook(layer: Any) -> None:
    layer.factors[0].register_forward_hook(lambda module, x, y: y * 2)


def backward_hook(layer: Any) -> None:
    layer.factors[0].register_full_backward_hook(lambda *_: None)


def hook_between(layer: Any) -> None:
    layer.factors.register_forward_pre_hook(lambda *_: None)


def quantized(layer: Any) -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    quantize(layer.factors, {nn.Linear}, dtype=torch.qint8, inplace=True)


def patched(layer: Any) -> None:
    layer.factors[0].forward = lambda x: x


def patched_layer(layer: Any) -> None:
    layer.forward = lambda x: x


def beside(layer: Any) -> None:
    layer.gain = nn.Parameter(torch.ones(1))


def other_shape(layer: Any) -> None:
    layer.factors[0].weight = nn.Parameter(torch.zeros(5, 7))


def inner_bias(layer: Any) -> None:
    layer.factors[0].bias = nn.Parameter(torch.zeros(16))


ALTERED: dict[str, tuple[Callable[[Any], None], str]] = {
    "adapter": (adapter, r"factor 0 is a .*Adapter, not the torch.nn.Linear that rewrite made.*merge_and_unload\(\)"),
    "activation": (activation, "3 modules in the place of 2 factors: Linear, Tanh, Linear"),
    "container": (other_container, "its factors are in a Doubled with a forward of its own"),
    "pruned": (pruned, r"factor 1 is pruned. Call torch.nn.utils.prune.remove\(factor, 'weight'\) first"),
    "weight norm": (weight_norm, r"by a parametrization. Call .*remove_parametrizations\(factor, 'weight'\) first"),
    "forward hook": (
        forward_hook,
        r"factor 0 has a hook, forward_hook.*lambda>. Remove the hook first: call remove\(\)",
    ),
    "backward hook": (backward_hook, "factor 0 has a hook, backward_hook"),
    "hook between": (hook_between, "its factors have a hook, hook_between"),
    "quantized": (
        quantized,
        r"factor 0 is a torch.ao.*dynamic.*Linear, not the torch.nn.Linear.*before it was quantized",
    ),
    "patched factor": (patched, "factor 0 has another forward than Linear"),
    "patched layer": (patched_layer, "its forward is no longer the one that it was made with"),
    "beside": (beside, "it holds 'gain' besides its factors"),
    "shape": (other_shape, r"computes something else than at the rewrite: it is Linear"),
    "bias": (inner_bias, "factor 0 has a bias, and only the last factor may have one"),
}


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("path", ["2", "3.kernel"])
@pytest.mark.parametrize(("alter", "text"), ALTERED.values(), ids=ALTERED.keys())
def test_altered_factors_are_not_merged(alter: Callable[[Any], None], text: str, path: str) -> None:
    model = rewritten()
    alter(model.get_submodule(path))
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(tdfx.MergeError, match=rf"The factors of {path!r} are not as rewrite made them.*{text}"):
        tdfx.merge(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    # Nor are their ranks lowered; the other layer's are.
    sites = {site.name: site for site in tdfx.plan(model, LOW, emit="modules")}
    assert sites[path].reason is tdfx.Reason.CUSTOM_FORWARD
    assert sites["0"].factorized


def test_factors_with_other_values_are_merged() -> None:
    model = rewritten()
    x = torch.randn(3, 16)
    for layer in (model[2], model[3].kernel):
        parametrizations.weight_norm(layer.factors[0])
        parametrize.remove_parametrizations(layer.factors[0], "weight")
        prune.l1_unstructured(layer.factors[1], "weight", amount=0.5)  # type: ignore[no-untyped-call]
        prune.remove(layer.factors[1], "weight")  # type: ignore[no-untyped-call]
        layer.factors[0].register_forward_hook(lambda *_: None).remove()
        layer.register_forward_hook(lambda *_: None)  # a hook of the layer itself goes along
        assert alteration_of(layer) == ""
    model.half().float()
    torch.testing.assert_close(tdfx.merge(model)(x), model(x))


WRITES: dict[str, Callable[[Any], Any]] = {
    "clamp_": lambda weight: weight.clamp_(0, 1),
    "data.mul_": lambda weight: weight.data.mul_(2),
    "data.copy_": lambda weight: weight.data.copy_(torch.ones_like(weight)),
    "init": nn.init.zeros_,
    "kaiming": nn.init.kaiming_uniform_,
    "row": lambda weight: weight[0].zero_(),
    "data row": lambda weight: weight.data[0].zero_(),
    "transposed": lambda weight: weight.t().mul_(2),
    "detached": lambda weight: weight.detach().view(-1).mul_(2),
    "part": lambda weight: weight.chunk(2)[1].mul_(2),
    "set data": lambda weight: setattr(weight, "data", torch.ones(3)),
    "set grad": lambda weight: setattr(weight, "grad", None),
    "set requires_grad": lambda weight: setattr(weight, "requires_grad", False),
    "out": lambda weight: torch.clamp(weight, 0, 1, out=weight.data),
    "foreach": lambda weight: torch._foreach_mul_([weight.data], 2.0),
    "vector": lambda weight: nn.utils.vector_to_parameters(torch.ones(weight.numel()), [weight]),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_to_the_weight_of_factors_raises(write: Callable[[Any], Any], grad: bool) -> None:
    model = rewritten()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    reads: tuple[Callable[[], Tensor], ...] = (lambda: model[2].weight, lambda: model[3].kernel)
    for get in reads:
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(tdfx.ModelError, match=r"would be lost|is an attribute of the"),
        ):
            write(get())
    assert all(map(torch.equal, before, model.parameters()))


def test_a_numpy_view_of_the_weight_of_factors_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        rewritten()[2].weight.detach().numpy()[0] = 1


def test_what_is_computed_from_the_weight_of_factors_is_a_plain_tensor() -> None:
    layer = rewritten()[2]
    weight = layer.weight
    assert type(weight) is JoinedWeight
    for value in (weight * 2, weight.square().sum(), weight.clone(), weight.double(), copy.deepcopy(weight.detach())):
        assert type(value) is Tensor
    weight.clone().mul_(2)
    weight.square().sum().backward()  # type: ignore[no-untyped-call]
    assert layer.factors[0].weight.grad.norm() > 0
    assert type(pickle.loads(pickle.dumps(weight.detach()))) is Tensor
    torch.save({"weight": weight.detach()}, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["weight"], weight)
    torch.testing.assert_close(weight.detach(), layer.joined(), check_dtype=False)


@pytest.mark.parametrize("name", ["in_features", "weight", "bias"])
def test_an_attribute_of_the_original_cannot_be_set_on_its_factors(name: str) -> None:
    layer = rewritten()[2]
    with pytest.raises(tdfx.ModelError, match=f"'{name}' is an attribute of the Linear that these factors replace"):
        setattr(layer, name, 3)
    layer.note = "an attribute of its own"
    assert layer.in_features == 32

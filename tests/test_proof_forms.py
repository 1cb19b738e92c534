"""The proof by ONNX of models with several names for a tensor, padded values read twice, and inputs that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdfx
from tdfx.errors import ExportError, InputError
from tdfx.onnx_proof.alias_groups import aliases_of
from tdfx.onnx_proof.plain_forward import named_tensors, output_tensors

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
SIGNAL = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(2))


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().eval()


class Pair(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.b(self.a(x).relu()))

    def forward(self, x: Any) -> Any:
        return self.body(x)


class Twice(Pair):
    """Calls a layer by its second name, and lists both once more."""

    def __init__(self) -> None:
        super().__init__()
        self.also, self.listed = self.b, nn.ModuleList([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.also(self.a(x).relu()))


class SharedBias(Pair):
    """One bias for two sites and for a layer that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.b.bias = self.norm.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.norm(self.b(x) + self.a(x).relu()))


def check_proved(
    build: Callable[[], nn.Module], *inputs: Any, emits: tuple[tdfx.Emit, ...] = ("graph", "modules")
) -> None:
    """Fail unless verify says yes to a full rank, and no to the other values of a merge."""
    model = made(build)
    for emit in emits:
        full = tdfx.rewrite(model, FULL, example_inputs=inputs, emit=emit)
        report = tdfx.verify(full, model, example_inputs=inputs)
        assert report.ok, str(report)
        assert report.contracted
    merged = tdfx.merge(tdfx.rewrite(model, HALF, example_inputs=inputs, emit=emits[-1]))
    assert not tdfx.verify(merged, model, example_inputs=inputs).ok


@pytest.mark.parametrize("build", [Twice, SharedBias])
def test_a_tensor_may_have_several_names(build: Callable[[], nn.Module]) -> None:
    check_proved(build, X)


def test_tensors_that_are_one_in_one_model_only_are_told_apart() -> None:
    class Apart(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return cast("Tensor", self.b(x) + self.a(x).relu())

    class Shared(Apart):
        def __init__(self) -> None:
            super().__init__()
            self.b.bias = self.a.bias

    apart, shared = made(Apart), made(Shared)
    assert aliases_of(shared) == (("a.bias", "b.bias"),)
    assert not tdfx.verify(shared, apart, example_inputs=(X,)).graphs_match
    assert not tdfx.verify(tdfx.rewrite(shared, FULL), apart, example_inputs=(X,)).graphs_match
    assert not tdfx.verify(tdfx.rewrite(apart, FULL), shared, example_inputs=(X,)).graphs_match
    assert tdfx.verify(tdfx.rewrite(shared, FULL), shared, example_inputs=(X,)).graphs_match


class Gate(nn.Module):
    """One padded tensor for two convolutions, which is given back too."""

    def __init__(self, kernel: int, padding: Any, mode: Any = "zeros") -> None:
        super().__init__()

        def make() -> nn.Conv1d:
            return nn.Conv1d(16, 16, kernel, padding=padding, padding_mode=mode)

        self.filter, self.gate = make(), make()

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        padded = F.pad(signal, (4, 0))
        return self.filter(padded).tanh() * self.gate(padded).sigmoid(), padded


PADDED = [(3, "valid", "zeros"), (3, "same", "zeros"), (4, "same", "zeros"), (3, 1, "reflect"), (3, "same", "circular")]


@pytest.mark.parametrize("setting", PADDED, ids=map(str, PADDED))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_a_padded_tensor_may_be_read_twice(setting: tuple[int, Any, str]) -> None:
    check_proved(lambda: Gate(*setting), SIGNAL, emits=("graph",))


class OfDict(Pair):
    """Takes a dict with a list, a number and None; gives a dict with None, a number and text."""

    def forward(self, x: Tensor, settings: Any, mask: Any = None, scale: float = 1.0) -> Any:  # type: ignore[override]
        y = self.body(x) * settings["scales"][0] * scale
        return {"loss": None, "logits": y if mask is None else y * mask, "count": 3, "share": 0.5, "name": "pair"}


def test_inputs_and_outputs_may_hold_more_than_tensors(tmp_path: Any) -> None:
    settings = {"scales": [X.sigmoid(), 2], "unused": None}
    check_proved(OfDict, X, settings, None, 2.0)
    model = made(OfDict)
    low = tdfx.rewrite(model, HALF, example_inputs=(X, settings))
    report = tdfx.export(
        low,
        tmp_path / "low.onnx",
        example_inputs={"scale": 2.0, "settings": settings, "x": X},
        dynamic_axes={"x": {0: "batch"}, "settings_scales_0": {0: "batch"}},
    )
    assert report.inputs == ("x: float[batch, 16]", "settings_scales_0: float[batch, 16]")
    session = onnxruntime.InferenceSession(tmp_path / "low.onnx")
    arrays = {"x": X[:2].numpy(), "settings_scales_0": X[:2].sigmoid().numpy()}
    logits, count, share = session.run(None, arrays)
    expected = low(X[:2], {"scales": [X[:2].sigmoid()]}, None, 2.0)
    np.testing.assert_allclose(logits, expected["logits"].detach(), rtol=1e-4, atol=1e-6)
    assert (count, share) == (3, 0.5)


@dataclass
class Result:
    """What some models give."""

    logits: Tensor
    extra: Any = None


def test_a_number_that_differs_is_seen_and_a_dataclass_is_taken() -> None:
    class Counting(Pair):
        count = 3

        def forward(self, x: Tensor) -> Any:
            return Result(self.body(x), {"count": self.count})

    model, other = made(Counting), made(Counting)
    assert tdfx.verify(model, other, example_inputs=(X,)).ok
    cast("Any", other).count = 4
    assert not tdfx.verify(model, other, example_inputs=(X,)).ok


def test_what_cannot_be_taken_is_said_with_what_to_do() -> None:
    class Odd(Pair):
        def forward(self, x: Any) -> Any:
            return object()

    with pytest.raises(ExportError, match=r"gives a object, in which no tensors can be found. Wrap it in a module"):
        tdfx.verify(Odd(), Odd(), example_inputs=(X,))
    with pytest.raises(InputError, match=r"not \(Result\).*wrap a model that takes other objects in a module"):
        tdfx.verify(Odd(), Odd(), example_inputs=(Result(X),))


def test_verify_leaves_a_model_that_counts_its_calls_as_it_was() -> None:
    class Counts(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.body(x)

    model: Any = made(Counts)
    tdfx.verify(model, model, example_inputs=(X,))
    assert model.calls == 0
    assert model.seen == 0


def test_names_and_values_of_nested_tensors() -> None:
    one = torch.ones(1)
    assert list(named_tensors({"x": one, "y": [one, {"z": one, "n": 3}], "none": None})) == ["x", "y_0", "y_1_z"]
    assert [value.tolist() for value in output_tensors((one, [2, {"a": True}], None, "text"))] == [[1.0], 2, True]

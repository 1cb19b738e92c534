"""The proof by ONNX of models with several names for a tensor, padded values read twice, and inputs that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
from tdfx.onnx_proof.torch_to_onnx import export_module

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


class Stack(nn.Module):
    """Two sites, a difference and a constant, each of which may be another one."""

    def __init__(
        self, mode: Any = "reflect", stride: int = 3, bias: bool = True, swapped: bool = False, constant: float = 0.5
    ) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv1d(16, 16, 2, stride=stride),
            nn.Conv1d(16, 16, 3, padding=1, padding_mode=mode, bias=bias),
        )
        self.swapped, self.constant = swapped, constant

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        difference: Tensor = y - z if self.swapped else z - y
        return difference * self.constant


def test_a_factorized_model_is_told_from_models_that_differ_in_one_thing(tmp_path: Any) -> None:
    x, model = SIGNAL[..., :5], made(Stack)
    paths = {"low": tmp_path / "low.onnx", "full": tmp_path / "full.onnx"}
    for name, policy in {"low": HALF, "full": FULL}.items():
        export_module(tdfx.rewrite(model, policy, example_inputs=(x,)), (x,), paths[name])
    assert tdfx.verify(paths["low"], model, example_inputs=(x,)).graphs_match
    changes: list[dict[str, Any]] = [
        {"mode": "replicate"},
        {"stride": 2},  # two positions as before
        {"bias": False},
        {"swapped": True},
        {"constant": 0.501},
    ]
    for change in changes:
        other = Stack(**change).eval()
        other.load_state_dict(model.state_dict(), strict=False)
        assert other(x).shape == model(x).shape
        assert not tdfx.verify(paths["low"], other, example_inputs=(x,)).structure_matches, change
    with torch.no_grad():
        cast("Any", model).first.weight[3, 5, 1] += 1e-2
    report = tdfx.verify(paths["full"], model, example_inputs=(x,))
    assert report.graphs_match
    assert not report.numbers_match


class Products(nn.Module):
    """Parameters in products of several kinds."""

    a: Tensor
    b: Tensor
    d: Tensor

    def __init__(self, of_rows: str = "bni,io->bno", heads: str = "bnd,dhk->bhnk") -> None:
        super().__init__()
        self.of_rows, self.heads = of_rows, heads
        for name, shape in {
            "a": (8, 6),
            "b": (6, 8),
            "c": (8, 8),
            "d": (3, 8, 6),
            "e": (8, 4, 4),
            "f": (8, 6, 3),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Any:
        last = torch.einsum("bni,iog->bngo", x, self.f)
        rows = torch.einsum(self.of_rows, x, self.c)
        return x @ self.a, x @ self.b.T, rows, torch.bmm(x, self.d), torch.einsum(self.heads, x, self.e), last


ROWS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(4))


def test_parameters_in_products_are_contracted_by_the_axes_that_meet() -> None:
    model = made(Products)
    low = tdfx.rewrite(model, HALF, example_inputs=(ROWS,))
    assert sum(isinstance(module, tdfx.Factorized) for module in low.modules()) == 6
    report = tdfx.verify(low, tdfx.merge(low), example_inputs=(ROWS,))
    assert report.ok, str(report)
    assert len(report.contracted) == 6
    # The same shapes, and other axes: below full rank only the graphs can tell.
    for other in (Products(of_rows="bni,oi->bno"), Products(heads="bnd,dkh->bhnk")):
        report = tdfx.verify(low, other, example_inputs=(ROWS,))
        assert not report.structure_matches
        assert "terms" in str(report)


class Experts(nn.Module):
    """Slices of one stacked weight, one after the other."""

    def __init__(self, order: tuple[int, ...] = (0, 1, -1), transposed: bool = False) -> None:
        super().__init__()
        self.order, self.transposed = order, transposed
        self.w = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.tanh(x @ (self.w[index].t() if self.transposed else self.w[index]))
        return x


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_of_a_stacked_weight_are_contracted_each_by_its_number(transposed: bool) -> None:
    model = made(lambda: Experts(transposed=transposed))
    low = tdfx.rewrite(model, HALF, example_inputs=(X,))
    assert any(isinstance(module, tdfx.Factorized) for module in low.modules())
    merged = tdfx.merge(low)
    report = tdfx.verify(low, merged, example_inputs=(X,))
    assert report.ok, str(report)
    assert len(report.contracted) == 1
    other = Experts((1, 0, -1), transposed)  # the same shapes, and the slices in another order
    other.load_state_dict(merged.state_dict())
    assert not tdfx.verify(low, other, example_inputs=(X,)).structure_matches
    assert not tdfx.verify(low, Experts(transposed=not transposed), example_inputs=(X,)).structure_matches


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


@dataclass(frozen=True)
class Batch:
    """What some models take: it holds another dataclass, and derives a value."""

    rows: Tensor
    inner: Result
    scale: float = 2.0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.rows.sum())


class OfBatch(Pair):
    def forward(self, batch: Batch, plain: Tensor) -> Any:  # type: ignore[override]
        mask = batch.inner.extra["mask"]
        return self.body(batch.rows * batch.scale) * mask * batch.total + batch.inner.logits + plain


def batch_of(rows: Tensor) -> Batch:
    return Batch(rows, Result(rows.cos(), {"mask": rows.sigmoid(), "count": 3}))


def test_a_dataclass_is_taken_with_its_tensors_as_inputs(tmp_path: Any) -> None:
    batch = batch_of(X)
    check_proved(OfBatch, batch, X)
    model = made(OfBatch)
    names = ["batch_rows", "batch_inner_logits", "batch_inner_extra_mask", "plain"]
    report = tdfx.export(
        model,
        tmp_path / "model.onnx",
        example_inputs={"plain": X, "batch": batch},
        dynamic_axes={name: {0: "batch"} for name in names},
    )
    assert report.inputs == tuple(f"{name}: float[batch, 16]" for name in names)
    # Other values, of another length: what the dataclass derives is part of the graph.
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    other = batch_of(rows)
    values = (rows, other.inner.logits, other.inner.extra["mask"], rows)
    arrays = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    (output,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, arrays)
    np.testing.assert_allclose(output, model(other, rows).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        InputError, match=r"OfBatch does not accept.*Batch\(rows=float32\[4, 15\], inner=Result\(logits="
    ):
        tdfx.verify(model, model, example_inputs=(batch_of(X[:, 1:]), X))


class Opaque:
    """What no exporter can look into."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


def test_what_cannot_be_taken_is_said_with_what_to_do() -> None:
    class Odd(Pair):
        def forward(self, x: Any) -> Any:
            return Opaque(self.body(x.rows))

    with pytest.raises(InputError, match=r"not \(Opaque\).*wrap a model that takes other objects in a module"):
        tdfx.verify(Odd(), Odd(), example_inputs=(Opaque(X),))

    class Wrapped(nn.Module):
        """As both messages advise."""

        def __init__(self, model: nn.Module, unwrap: bool = True) -> None:
            super().__init__()
            self.model, self.unwrap = model, unwrap

        def forward(self, rows: Tensor) -> Any:
            result = self.model(Opaque(rows))
            return result.rows if self.unwrap else result

    model = made(Odd)
    with pytest.raises(ExportError, match=r"gives a Opaque, in which no tensors can be found. Wrap it in a module"):
        tdfx.verify(Wrapped(model, False), Wrapped(model, False), example_inputs=(X,))
    full = tdfx.rewrite(model, FULL, example_inputs=(Opaque(X),))
    assert tdfx.verify(Wrapped(full), Wrapped(model), example_inputs=(X,)).ok
    assert not tdfx.verify(Wrapped(full), Wrapped(made(Odd, 1)), example_inputs=(X,)).ok


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

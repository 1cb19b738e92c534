"""Chains of factors, contracted to one node each: every scheme and kind of layer, and what must not pass for a chain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, helper
from torch import Tensor, nn

import tdfx
from tdfx.errors import ExportError
from tdfx.onnx_proof.chains import METADATA_KEY
from tdfx.onnx_proof.export import export_module

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def factorize(model: nn.Module, scheme: str = "auto", rank: float = 0.5, x: Tensor = X) -> nn.Module:
    policy = tdfx.Policy(rank=tdfx.Ratio(of=rank), scheme=scheme, min_gain=0, round_to=1, cost=tdfx.Modelled())
    return tdfx.rewrite(model, policy, example_inputs=(x,))


class Wide(nn.Module):
    """One layer between two nodes that no rewrite touches."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.relu(x)))


def conv(**settings: object) -> nn.Module:
    return nn.Conv2d(8, 12, 3, **settings)  # type: ignore[arg-type]


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tucker2": (lambda: conv(padding=1, stride=2), "tucker2"),
    "tucker1_out": (lambda: conv(padding=(0, 1)), "tucker1_out"),
    "tucker1_in": (lambda: conv(padding=1, bias=False), "tucker1_in"),
    "spatial": (lambda: conv(padding=1, stride=(1, 2), dilation=(2, 1)), "spatial"),
    "cp": (lambda: conv(padding=1, stride=2), "cp"),
    "depthwise": (lambda: conv(padding=1, stride=2), "depthwise"),
    "groups": (lambda: conv(groups=2, padding=1), "tucker2"),
    "depthwise layer": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), "spatial"),
    "same": (lambda: conv(padding="same"), "tucker2"),
    "reflect": (lambda: conv(padding=1, padding_mode="reflect"), "tucker2"),
    "circular, spatial": (lambda: conv(padding=(2, 1), padding_mode="circular"), "spatial"),
    "replicate, no bias": (lambda: conv(padding=1, padding_mode="replicate", bias=False), "channel"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), "tucker2"),
    "transposed, spatial": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=(2, 1), output_padding=(1, 0)), "spatial"),
    "1x1": (lambda: nn.Conv2d(8, 12, 1, stride=2), "svd"),
    "linear": (lambda: nn.Linear(9, 7), "svd"),
    "linear, no bias": (lambda: nn.Linear(9, 7, bias=False), "svd"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_scheme_is_contracted_to_what_it_stands_for(name: str) -> None:
    build, scheme = LAYERS[name]
    model = Wide(build())
    factorized = factorize(model, scheme)
    report = tdfx.verify(factorized, model, (X,))
    assert report.ok, report
    assert report.structure_matches
    assert report.approximate == 1
    assert len(report.contracted) == 1
    assert report.contracted[0].startswith(f"layer ({scheme.replace('channel', 'tucker1_out')}")
    assert report.max_error > 1e-3
    assert tdfx.verify(factorized, tdfx.merge(factorized), (X,)).numbers_match
    text = str(report)
    assert f"same structure ({report.nodes} nodes) after contracting 1 chain(s) of factors\n    layer (" in text
    assert "the numbers differ by the approximation (largest relative error" in text


class Functional(nn.Module):
    """A weight that a function is given, a layer called twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.randn(10, 8, 3, 3)), nn.Parameter(torch.randn(10))
        self.aside = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        return F.conv2d(x, self.weight, self.bias, stride=2)


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_layer_called_twice_and_a_parameter_are_contracted(emit: str) -> None:
    model = Functional()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, cost=tdfx.Modelled())
    factorized = tdfx.rewrite(model, policy, example_inputs=(X,), emit=emit)  # type: ignore[arg-type]
    report = tdfx.verify(factorized, model, (X,))
    assert report.ok, report
    assert [one.partition(" (")[0] for one in report.contracted] == ["weight", "twice"]
    assert report.contracted[1].endswith("13 and 1 nodes are one, at 2 places")


class Heads(nn.Module):
    """Computes something else in train mode, as GoogLeNet's auxiliary heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = nn.Linear(9, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y + self.aside(y) if self.training else y


def test_what_is_not_computed_in_eval_mode_is_said() -> None:
    model = Heads()
    report = tdfx.verify(factorize(model), model, (X,))
    assert report.ok, report
    assert report.contracted[1].endswith("): not computed in eval mode")


def test_at_full_rank_the_numbers_must_agree() -> None:
    model = Wide(conv(padding=1))
    factorized = factorize(model, "tucker2", rank=1.0)
    report = tdfx.verify(factorized, model, (X,))
    assert report.ok, report
    assert report.numbers_match
    assert report.approximate == 0
    with torch.no_grad():
        factorized.get_submodule("layer.factors.1").weight.mul_(1.01)  # type: ignore[operator, union-attr]
    report = tdfx.verify(factorized, model, (X,))
    assert report.graphs_match
    assert not report.ok


def test_either_side_may_be_factorized_and_equal_chains_stay() -> None:
    model = Wide(conv(padding=1))
    factorized, lower = factorize(model, "tucker2"), factorize(model, "tucker2", rank=0.25)
    assert tdfx.verify(model, factorized, (X,)).contracted
    assert tdfx.verify(factorized, lower, (X,)).contracted[0].startswith("layer (tucker2 ")
    again = tdfx.verify(factorized, factorize(model, "tucker2"), (X,))
    assert again.contracted == ()
    assert again.numbers_match


# --- what is not the chain that was recorded ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelProto, Path]:
    """The factorized model, to be changed, and the file of the original."""
    torch.manual_seed(0)
    model = Wide(conv(padding=1, stride=2, dilation=(1, 2)))
    folder = tmp_path_factory.mktemp("contract")
    export_module(factorize(model, "tucker2"), (X,), folder / "factorized.onnx")
    export_module(model, (X,), folder / "original.onnx")
    return onnx.load(folder / "factorized.onnx"), folder / "original.onnx"


def convolutions(model: ModelProto) -> list[NodeProto]:
    return [one for one in model.graph.node if one.op_type == "Conv"]


def set_ints(node: NodeProto, name: str, values: list[int]) -> None:
    next(one for one in node.attribute if one.name == name).ints[:] = values


def between(model: ModelProto, op: str) -> None:
    """Put a node between the first factor and the second."""
    first, second, _ = convolutions(model)
    made = helper.make_node(op, [first.output[0]], ["planted"], name="planted")
    model.graph.node.insert(list(model.graph.node).index(second), made)
    second.input[0] = "planted"


def read_inside(model: ModelProto) -> None:
    last = model.graph.node[-1]
    made = helper.make_node("Neg", [convolutions(model)[0].output[0]], ["planted"], name="planted")
    model.graph.node.insert(len(model.graph.node) - 1, made)
    result = helper.make_tensor_value_info("planted", onnx.TensorProto.FLOAT, None)
    assert last.op_type == "Tanh"
    model.graph.output.append(result)


def take_weight_apart(model: ModelProto) -> None:
    node = convolutions(model)[0]
    made = helper.make_node("Neg", [node.input[1]], ["planted"], name="planted")
    model.graph.node.insert(0, made)
    node.input[1] = "planted"


def add_input(model: ModelProto) -> None:
    between(model, "Relu")
    node = next(one for one in model.graph.node if one.name == "planted")
    node.op_type = "Mul"
    node.input.append("scale")
    model.graph.input.append(helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, [1]))


CHANGES: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "strides": (lambda m: set_ints(convolutions(m)[1], "strides", [2, 1]), r"'layer' \(Conv site\) has .*strides"),
    "stride first": (lambda m: set_ints(convolutions(m)[0], "strides", [2, 2]), r"'layer' \(Conv site\) has extent"),
    "stride last": (lambda m: set_ints(convolutions(m)[2], "strides", [2, 2]), r"'layer' \(Conv site\) has strides"),
    "pads": (lambda m: set_ints(convolutions(m)[1], "pads", [1, 1, 1, 0]), r"has pads \[1, 1, 1, 0\], but 'layer' in"),
    "inner padding": (lambda m: set_ints(convolutions(m)[0], "pads", [1, 0, 0, 0]), r"has pads \[2, 1, 1, 1\], but"),
    "dilations": (lambda m: set_ints(convolutions(m)[1], "dilations", [2, 2]), r"has extent \[4, 4\], but 'layer' in"),
    "weight apart": (take_weight_apart, r"in the model, the weight 'layer\.factors\.0\.weight' of the site .* is read by"),
    "input inside": (add_input, r"in the model, the site layer \(tucker2 .*\) reads the input 'scale' on the way"),
    "read inside": (read_inside, r"in the model, a value inside the site layer \(tucker2 .*\), 'conv2d', is read else"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_chain_that_does_something_else_is_seen(
    name: str, files: tuple[ModelProto, Path], tmp_path: Path
) -> None:
    model = ModelProto.FromString(files[0].SerializeToString())
    change, text = CHANGES[name]
    change(model)
    onnx.save(model, tmp_path / "changed.onnx")
    report = tdfx.verify(tmp_path / "changed.onnx", files[1])
    assert not report.ok
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(report.structure)
    assert report.place is not None


def test_a_nonlinear_node_inside_a_chain_is_seen(files: tuple[ModelProto, Path], tmp_path: Path) -> None:
    model = ModelProto.FromString(files[0].SerializeToString())
    between(model, "Relu")
    onnx.save(model, tmp_path / "changed.onnx")
    report = tdfx.verify(tmp_path / "changed.onnx", files[1])
    assert not report.structure_matches, report


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "JSONDecodeError"),
        ('{"a": 1}', "AttributeError|TypeError|ValueError"),
        ('[{"site": "a"}]', "a record has the entries"),
        ("5", "TypeError"),
        ("ranks", "ranks is"),
        ("factors", "factors is"),
    ],
)
def test_damaged_metadata_is_refused(
    text: str, message: str, files: tuple[ModelProto, Path], tmp_path: Path
) -> None:
    model = ModelProto.FromString(files[0].SerializeToString())
    (entry,) = model.metadata_props
    assert entry.key == METADATA_KEY
    if text in {"ranks", "factors"}:
        (record,) = json.loads(entry.value)
        entry.value = json.dumps([{**record, text: [] if text == "factors" else [0.5]}])
    else:
        entry.value = text
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(ExportError, match=f"metadata 'tdfx.chains' is damaged: .*({message}).*Export the model again"):
        tdfx.verify(tmp_path / "damaged.onnx", files[1])

"""Chains of factors are contracted to one node: for every scheme and kind of layer, and only where they are chains."""

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
from tdfx.onnx_proof.compare_graphs import Comparison, compare_factorized
from tdfx.onnx_proof.factor_chains import METADATA_KEY
from tdfx.onnx_proof.onnx_file import read_file
from tdfx.onnx_proof.torch_to_onnx import export_module

X = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def factorize(model: nn.Module, scheme: str = "auto", rank: float = 0.5, x: Tensor = X) -> nn.Module:
    policy = tdfx.Policy(rank=tdfx.Ratio(of=rank), scheme=scheme, min_gain=0, round_to=1, cost=tdfx.Modelled())
    return tdfx.rewrite(model, policy, example_inputs=(x,))


class Wide(nn.Module):
    """A layer between two nodes that no rewrite changes."""

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
    "depthwise_layer": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), "spatial"),
    "same": (lambda: conv(padding="same"), "tucker2"),
    "reflect": (lambda: conv(padding=1, padding_mode="reflect"), "tucker2"),
    "circular_spatial": (lambda: conv(padding=(2, 1), padding_mode="circular"), "spatial"),
    "replicate": (lambda: conv(padding=1, padding_mode="replicate", bias=False), "tucker1_out"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), "tucker2"),
    "transposed_spatial": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=(2, 1), output_padding=(1, 0)), "spatial"),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1, stride=2), "svd"),
    "linear": (lambda: nn.Linear(9, 7), "svd"),
    "linear_bare": (lambda: nn.Linear(9, 7, bias=False), "svd"),
}


class Every(nn.Module):
    """All layers side by side, so that they are exported together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: build() for name, (build, _) in LAYERS.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.tanh(layer(torch.relu(x))) for layer in self.layers.values()]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The files of the factorized, the original and the merged model."""
    torch.manual_seed(0)
    model = Every()
    rank, cost = tdfx.Ratio(of=0.5), tdfx.Modelled()
    schemes = {
        f"layers.{name}": tdfx.Policy(rank=rank, scheme=scheme, min_gain=0, round_to=1, cost=cost)
        for name, (_, scheme) in LAYERS.items()
    }
    factorized = tdfx.rewrite(model, tdfx.Policy(overrides=schemes), example_inputs=(X,))
    folder = tmp_path_factory.mktemp("every")
    models = {"factorized": factorized, "original": model, "merged": tdfx.merge(factorized)}
    for name, module in models.items():
        export_module(module, (X,), folder / f"{name}.onnx")
    return folder / "factorized.onnx", folder / "original.onnx", folder / "merged.onnx"


def test_every_scheme_is_contracted_to_the_layer_that_it_replaces(every: tuple[Path, Path, Path]) -> None:
    factorized, original, merged = every
    report = tdfx.verify(factorized, original, (X,))
    assert report.ok, report
    assert report.structure_matches
    names = [line.partition(" ")[0] for line in report.contracted]
    assert names == [f"layers.{name}" for name in LAYERS]
    for line, (_, scheme) in zip(report.contracted, LAYERS.values(), strict=True):
        assert f"({scheme} " in line
    assert report.approximate == len(LAYERS)
    assert 1e-3 < report.max_error < 10
    text = str(report)
    assert (
        f"same structure ({report.nodes} nodes) after contracting {len(LAYERS)} chain(s) of factors\n    layers" in text
    )
    assert f"    and {len(LAYERS) - 8} more\n" in text
    assert "the numbers differ by the approximation (largest relative error" in text
    exact = tdfx.verify(factorized, merged, (X,))
    assert exact.structure_matches
    assert exact.numbers_match


@pytest.mark.parametrize("place", range(2))
def test_a_layer_with_other_geometry_does_not_match(every: tuple[Path, Path, Path], place: int, tmp_path: Path) -> None:
    """Change the stride or padding of each convolution of the original in turn."""
    factorized, original, _ = every
    name = ("strides", "pads")[place]
    clean = onnx.load(original)
    for index, node in enumerate(clean.graph.node):
        if node.op_type not in {"Conv", "ConvTranspose"}:
            continue
        model = ModelProto.FromString(clean.SerializeToString())
        attribute = next(attribute for attribute in model.graph.node[index].attribute if attribute.name == name)
        attribute.ints[0] += 1
        onnx.save(model, tmp_path / "changed.onnx")
        report = compare_factorized(read_file(factorized)[1], read_file(tmp_path / "changed.onnx")[1])
        assert report.comparison.structure is not None
        assert " site) has " in report.comparison.structure.text


class Functional(nn.Module):
    """A weight that a function takes, a layer that is called twice, and a layer that is never called."""

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
    assert [line.partition(" (")[0] for line in report.contracted] == ["twice", "weight"]
    assert report.contracted[0].endswith("13 and 1 nodes are one, at 2 places")


class Heads(nn.Module):
    """A model that computes something else in train mode, as GoogLeNet with its auxiliary heads does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside = nn.Linear(9, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y + self.aside(y) if self.training else y


def test_a_site_that_is_not_computed_in_eval_mode_is_listed_as_such() -> None:
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
        factorized.get_submodule("layer.factors.1").weight.mul_(1.01)  # type: ignore[operator]
    report = tdfx.verify(factorized, model, (X,))
    assert report.graphs_match
    assert not report.ok


def test_either_side_may_be_factorized_and_equal_chains_are_not_contracted() -> None:
    model = Wide(conv(padding=1))
    factorized, lower = factorize(model, "tucker2"), factorize(model, "tucker2", rank=0.25)
    assert tdfx.verify(model, factorized, (X,)).contracted
    assert tdfx.verify(factorized, lower, (X,)).contracted[0].startswith("layer (tucker2 ")
    again = tdfx.verify(factorized, factorize(model, "tucker2"), (X,))
    assert again.contracted == ()
    assert again.numbers_match


# --- graphs that do not compute the recorded chain ------------------------------------------------------------------------


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
    return [node for node in model.graph.node if node.op_type == "Conv"]


def set_ints(node: NodeProto, name: str, values: list[int]) -> None:
    next(attribute for attribute in node.attribute if attribute.name == name).ints[:] = values


def between(model: ModelProto, op: str) -> None:
    """Insert a node between the first factor and the second."""
    first, second, _ = convolutions(model)
    planted = helper.make_node(op, [first.output[0]], ["planted"], name="planted")
    model.graph.node.insert(list(model.graph.node).index(second), planted)
    second.input[0] = "planted"


def read_inside(model: ModelProto) -> None:
    last = model.graph.node[-1]
    planted = helper.make_node("Neg", [convolutions(model)[0].output[0]], ["planted"], name="planted")
    model.graph.node.insert(len(model.graph.node) - 1, planted)
    result = helper.make_tensor_value_info("planted", onnx.TensorProto.FLOAT, None)
    assert last.op_type == "Tanh"
    model.graph.output.append(result)


def negate_weight(model: ModelProto) -> None:
    node = convolutions(model)[0]
    planted = helper.make_node("Neg", [node.input[1]], ["planted"], name="planted")
    model.graph.node.insert(0, planted)
    node.input[1] = "planted"


def read_past(model: ModelProto) -> None:
    convolutions(model)[1].input[0] = "x"


def add_ones(model: ModelProto) -> None:
    """Replace the zeros of a missing bias by ones."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in {"value_float", "value"} and node.op_type == "Constant":
                node.CopyFrom(helper.make_node("Constant", [], [*node.output], name=node.name, value_float=1.0))
                return


CHANGES: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "strides": (lambda m: set_ints(convolutions(m)[1], "strides", [2, 1]), r"'layer' \(Conv site\) has .*strides"),
    "stride first": (lambda m: set_ints(convolutions(m)[0], "strides", [2, 2]), r"'layer' \(Conv site\) has extent"),
    "stride last": (lambda m: set_ints(convolutions(m)[2], "strides", [2, 2]), r"'layer' \(Conv site\) has strides"),
    "pads": (lambda m: set_ints(convolutions(m)[1], "pads", [1, 1, 1, 0]), r"has pads \[1, 1, 1, 0\], but 'layer' in"),
    "inner padding": (lambda m: set_ints(convolutions(m)[0], "pads", [1, 0, 0, 0]), r"has pads \[2, 1, 1, 1\], but"),
    "dilations": (lambda m: set_ints(convolutions(m)[1], "dilations", [2, 2]), r"has extent \[4, 4\], but 'layer' in"),
    "nonlinear": (
        lambda m: between(m, "Relu"),
        r"in the model, 'planted' \(Relu\) stands inside the site layer \(tuck",
    ),
    "negated weight": (
        negate_weight,
        r"in the model, the weight 'layer\.factors\.0\.weight' of the site .* is read by",
    ),
    "read past": (read_past, r"in the model, the site layer \(tucker2 .*\) reads 'x' on the way"),
    "ones": (add_ones, r"in the model, the site layer \(tucker2 .*\) adds '\w+', which is not its bias"),
    "read inside": (read_inside, r"in the model, a value inside the site layer \(tucker2 .*\), 'conv2d', is read else"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_chain_is_seen(name: str, files: tuple[ModelProto, Path], tmp_path: Path) -> None:
    model = ModelProto.FromString(files[0].SerializeToString())
    change, text = CHANGES[name]
    change(model)
    onnx.save(model, tmp_path / "changed.onnx")
    report = tdfx.verify(tmp_path / "changed.onnx", files[1])
    assert not report.ok
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(report.structure)
    assert report.place is not None


@pytest.mark.parametrize(("name", "value"), [("alpha", 2.0), ("transB", 0), ("transA", 1)])
def test_a_changed_product_is_seen(name: str, value: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
    export_module(model, (X[:, :, 0, 0],), tmp_path / "original.onnx")
    factorized = factorize(model, x=X[:, :, 0, 0], rank=1.0)
    export_module(factorized, (X[:, :, 0, 0],), tmp_path / "changed.onnx")
    assert compare_factorized(
        *(read_file(tmp_path / f"{name}.onnx")[1] for name in ("changed", "original"))
    ).comparison == (Comparison(None, "walk"))
    proto = onnx.load(tmp_path / "changed.onnx")
    gemm = next(node for node in proto.graph.node if node.op_type == "Gemm")
    kept = [attribute for attribute in gemm.attribute if attribute.name != name]
    del gemm.attribute[:]
    gemm.attribute.extend([*kept, helper.make_attribute(name, value)])
    onnx.save(proto, tmp_path / "changed.onnx")
    changed, original = (read_file(tmp_path / f"{name}.onnx")[1] for name in ("changed", "original"))
    structure = compare_factorized(changed, original).comparison.structure
    assert structure is not None
    assert structure.text.startswith("node '1' (Linear site) has ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "JSONDecodeError"),
        ('{"a": 1}', "FieldError"),
        ('[{"site": "a"}]', "FieldError: lacks"),
        ("5", "TypeError"),
        ("ranks", r"has ranks\[0\]=0.5"),
        ("factors", "has no factors"),
    ],
)
def test_damaged_metadata_is_refused(text: str, message: str, files: tuple[ModelProto, Path], tmp_path: Path) -> None:
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

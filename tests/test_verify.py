"""Numbers, reports and errors of tdfx.verify, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import tdfx
from tdfx.errors import ExportError, InputError, ModelError
from tdfx.onnx_proof.compare_outputs import measure
from tdfx.onnx_proof.report import VerifyReport
from tdfx.onnx_proof.torch_to_onnx import export_module
from tdfx.onnx_proof.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
from onnx_models import Net, node, small

# --- numbers --------------------------------------------------------------------------------------------------------


def seeded_net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_one_weight_changed_by_a_thousandth_is_seen(x: Tensor, net_path: Path) -> None:
    model = seeded_net()
    with torch.no_grad():
        model.conv2.weight[0, 0, 1, 1] *= 1 + 1e-3
    report = verify(model, net_path, (x,))
    assert report.graphs_match
    assert not report.ok
    assert report.tolerance < report.max_error < 1e-2
    assert "\n  the numbers differ (largest relative error" in str(report)


def test_the_error_is_that_of_torch_and_the_tolerance_can_be_given(x: Tensor, net_path: Path) -> None:
    model, reference = Net().eval(), seeded_net().eval()
    with torch.no_grad():
        a, b = model(x).double(), reference(x).double()
    expected = float((a - b).abs().max() / b.abs().max())
    report = verify(model, net_path, (x,), tolerance=1.01 * expected)
    assert report.max_error == pytest.approx(expected, rel=1e-4)
    assert report.ok


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2.0**-23), (torch.float64, 2.0**-52)])
def test_the_default_tolerance_follows_dtype_and_depth(dtype: torch.dtype, eps: float) -> None:
    x, layer = torch.ones(1, 3, dtype=dtype), nn.Linear(3, 3, dtype=dtype)
    report = verify(nn.Sequential(layer, layer, layer, layer), nn.Sequential(layer, nn.ReLU()), x)
    assert report.nodes == 4
    assert report.tolerance == pytest.approx(2 * 16 * eps)


@pytest.mark.parametrize("where", [0, 1])
def test_nan_never_agrees(where: int) -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        models[where].bias[1] = math.nan
    report = verify(models[0], models[1], torch.ones(2, 3))
    assert report.graphs_match
    assert not report.ok
    assert math.isnan(report.max_error)
    assert report.problem == f"output 'linear' holds NaN: {2 * (1 - where)} in the model, {2 * where} in the reference"
    assert report.to_dict()["max_error"] is None


def test_nan_in_both_never_agrees() -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, math.nan)
    assert not verify(model, model, torch.ones(2, 3)).ok


def test_outputs_of_other_shapes_are_not_compared(x: Tensor) -> None:
    report = verify(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3), (x,))
    assert not report.ok
    assert math.isnan(report.max_error)
    assert str(report.problem) == "output 0, 'conv2d', has shape [2, 4, 3, 3], but [2, 4, 6, 6] in the reference"


@pytest.mark.parametrize(
    ("output", "other", "error"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([-np.inf, 1.0], [-np.inf, 1.0], 0.0),
        ([-np.inf, 1.0], [0.0, 1.0], math.inf),
        ([0.5], [0.0], math.inf),
        ([10**9], [10**9 + 1], 1.0),
        ([True], [False], 1.0),
        ([], [], 0.0),
    ],
)
def test_the_error_of_one_output(output: list[float], other: list[float], error: float) -> None:
    assert measure([np.array(output)], [np.array(other)], ["y"]).max_error == error


def test_the_largest_error_of_all_outputs_counts() -> None:
    outputs, others = [np.array([1.0]), np.array([3.0])], [np.array([1.0]), np.array([2.0])]
    assert measure(outputs, others, ["a", "b"]).max_error == 0.5
    assert measure(outputs[::-1], others[::-1], ["a", "b"]).max_error == 0.5


def test_shapes_that_differ_only_when_run_are_a_problem() -> None:
    problem = measure([np.zeros((2, 3))], [np.zeros((3, 2))], ["y"]).problem
    assert problem == "output 'y' is float64[2, 3], but float64[3, 2] in the reference"


def test_a_graph_that_cannot_run_is_not_verified() -> None:
    conv = nn.Conv2d(1, 1, 1).double()  # ONNX Runtime has no such kernel
    report = verify(conv, conv, torch.ones(1, 1, 2, 2).double())
    assert report.graphs_match
    assert not report.ok
    assert str(report.problem).startswith("ONNX Runtime cannot run the model: ")
    assert "\n  the numbers cannot be compared: ONNX Runtime" in str(report)


def test_conv3d_without_bias_runs() -> None:
    conv = nn.Conv3d(2, 3, 2, bias=False)
    assert verify(conv, conv, torch.randn(1, 2, 3, 3, 3)).ok


# --- the model is left as it was ----------------------------------------------------------------------------------------


class Stubborn(nn.Module):
    """A module that cannot be exported: its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if bool(x.sum() > 0) else -x


class FrozenNorm(nn.BatchNorm2d):
    """A BatchNorm that always stays in eval mode, as people freeze it."""

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(False)
        return self


def test_every_training_flag_is_as_before(x: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    net, tail = Net(), nn.Sequential(nn.Dropout(), nn.ReLU())
    net.bn = FrozenNorm(4)
    model = nn.Sequential(net, tail, nn.Identity()).train()
    tail.training = False
    net.conv1.training = False
    net.bn.training = True
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    assert len(set(flags)) == 2
    assert verify(model, model, (x,)).ok
    assert [module.training for module in model.modules()] == flags
    assert all(
        torch.equal(value, other) for value, other in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert capfd.readouterr() == ("", "")


def test_a_failed_export_says_why_and_leaves_the_model_as_it_was(x: Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(Stubborn(), nn.Dropout().eval())
    flags = [module.training for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    streams, filters = (sys.stdout, sys.stderr), list(warnings.filters)
    with pytest.raises(
        ExportError, match=r"^torch\.onnx cannot export Sequential: \w+: .*data-dependent.*one by one\.$"
    ):
        verify(model, model, (x,))
    assert [module.training for module in model.modules()] == flags
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert (sys.stdout, sys.stderr) == streams
    assert warnings.filters == filters
    assert capfd.readouterr() == ("", "")


def test_the_mode_is_switched_through_train() -> None:
    """A module may do more than set a flag when its mode changes."""

    class Counting(nn.Module):
        calls = ""

        def train(self, mode: bool = True) -> Counting:
            self.calls += "train " if mode else "eval "
            super().train(mode)
            return self

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    model = Counting()
    assert verify(model, nn.Identity(), torch.ones(1)).difference is not None
    assert model.calls == "eval train "


def test_warnings_during_an_export_do_not_leak() -> None:
    class Talkative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("a remark", stacklevel=1)
            return x + 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert verify(Talkative(), Talkative(), torch.ones(1)).ok
    assert not caught


def test_random_numbers_go_on_as_before(x: Tensor) -> None:
    model = nn.Dropout()
    state = torch.get_rng_state()
    verify(model, model, (x,))
    assert torch.equal(torch.get_rng_state(), state)


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (None, r"^example_inputs is missing: a module is exported by running it.*Pass example_inputs=\(x,\)"),
        (
            (3,),
            r"^example_inputs must be a tuple of tensors, not \(int\): pass example_inputs=\(x,\), or a dict of tensors by",
        ),
    ],
)
def test_bad_inputs_are_refused(inputs: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        verify(nn.ReLU(), nn.ReLU(), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_bad_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(InputError, match=r"^tolerance=\S+ is not a relative error: pass a number such as 1e-5"):
        verify(nn.ReLU(), nn.ReLU(), torch.ones(1), tolerance=tolerance)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), r"^example_inputs holds 0 tensor\(s\), but the graph takes 1: 'x'\.$"),
        (
            (torch.ones(2, 5),),
            r"^the example input for 'x' is float\[2, 5\], but the graph takes float\['\?0', 4\]: give",
        ),
        ((torch.ones(2, 4).half(),), r"^the example input for 'x' is float16\[2, 4\], but the graph takes float\["),
    ],
)
def test_inputs_that_do_not_fit_a_file_are_refused(inputs: tuple[Tensor, ...], text: str, tmp_path: Path) -> None:
    onnx.save(small([node("Relu", "x", "y")], ["y"]), tmp_path / "a.onnx")
    with pytest.raises(InputError, match=text):
        verify(tmp_path / "a.onnx", tmp_path / "a.onnx", inputs)


def test_inputs_are_taken_by_name() -> None:
    class Minus(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left - right

    inputs = {"right": torch.ones(2), "left": torch.full((2,), 3.0)}
    assert verify(Minus(), Minus(), inputs).ok
    with pytest.raises(
        InputError, match=r"^Minus does not accept the example inputs \(left: float32\[2\]\): TypeError"
    ):
        verify(Minus(), Minus(), {"left": torch.ones(2)})


def test_a_wrong_input_name_is_refused_with_the_names_that_a_file_takes(tmp_path: Path) -> None:
    onnx.save(small([node("Relu", "x", "y")], ["y"]), tmp_path / "a.onnx")
    assert verify(tmp_path / "a.onnx", tmp_path / "a.onnx", {"x": torch.ones(3, 4)}).ok
    with pytest.raises(InputError, match=r"^example_inputs has no 'x', only 'z'; the graph takes 'x'\.$"):
        verify(tmp_path / "a.onnx", tmp_path / "a.onnx", {"z": torch.ones(3, 4)})


def test_dynamic_axes_are_part_of_the_interface(x: Tensor, tmp_path: Path) -> None:
    axes = {"x": {0: "batch"}}
    model = seeded_net()
    export_module(model, (x,), tmp_path / "open.onnx", axes)
    assert verify(model, tmp_path / "open.onnx", (x,), dynamic_axes=axes).ok
    assert verify(model, tmp_path / "open.onnx", (x,)).ok  # by default they are those of the file
    assert verify(tmp_path / "open.onnx", model, (x,)).ok
    report = verify(model, tmp_path / "open.onnx", (x,), dynamic_axes={})
    assert report.interface == "input 0, 'x', has shape [2, 3, 8, 8], but [?0, 3, 8, 8] in the reference"
    assert not report.ok


def test_a_file_whose_output_has_no_name_is_refused(tmp_path: Path) -> None:
    model = small([node("Relu", "x", "y")], ["y"])
    model.graph.output[0].name = ""
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"^output 0 of the graph has no name"):
        verify(tmp_path / "a.onnx", tmp_path / "a.onnx")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    content = small([node("Relu", "x", "y")], ["y"]).SerializeToString()
    (tmp_path / "a.onnx").write_bytes(content.replace(b"n_y", b"n\x81y"))
    with pytest.raises(ExportError, match=r"holds a damaged ONNX graph: ValueError: the name b'n.x81y' is not UTF-8\."):
        verify(tmp_path / "a.onnx", tmp_path / "a.onnx")


def test_random_inputs_need_a_rank(tmp_path: Path) -> None:
    model = small([node("Relu", "x", "y")], ["y"])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(InputError, match=r"^no random values can be made for input 'x' \(float, shape None\): pass ex"):
        verify(tmp_path / "a.onnx", tmp_path / "a.onnx")


def test_anything_but_a_model_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^reference is a dict: verify takes an nn\.Module or the path of an \.onnx file"
    ):
        verify(nn.ReLU(), {}, torch.ones(1))  # type: ignore[arg-type]


def bad_files() -> Iterator[tuple[str, bytes, str]]:
    yield "text", b"these are not the bytes", r"cannot be read as ONNX: .*Export the model again\.$"
    yield "empty", b"", r"holds no ONNX graph: no version or no outputs\. Export"
    broken = small([node("Relu", "nowhere", "y")], ["y"]).SerializeToString()
    yield "broken", broken, r"^node 'n_y' \(Relu\) reads 'nowhere', which no input, initializer or earlier node makes"


@pytest.mark.parametrize(("content", "text"), [case[1:] for case in bad_files()], ids=[case[0] for case in bad_files()])
def test_a_file_without_a_valid_graph_is_refused(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=text):
        verify(path, path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"absent\.onnx' is not a file: give the path of an \.onnx file, or pass the"):
        verify(tmp_path / "absent.onnx", tmp_path / "absent.onnx")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    model = small([node("Gather", "x indices", "y")], ["y"], indices=np.arange(2000))
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    assert verify(tmp_path / "a.onnx", tmp_path / "a.onnx").problem is not None  # the indices reach beyond the axis
    (tmp_path / "weights").unlink()
    with pytest.raises(ExportError, match=r"a\.onnx' cannot be read as ONNX: .*weights"):
        verify(tmp_path / "a.onnx", tmp_path / "a.onnx")


def test_a_report_cannot_contradict_itself() -> None:
    report = VerifyReport(
        structure=None,
        interface=None,
        max_error=math.nan,
        tolerance=1.0,
        problem=None,
        nodes=1,
        settled_by="walk",
        seconds=0.0,
    )
    assert not report.ok
    assert not bool(report)


class Difference(nn.Module):
    """Takes two inputs, and may take them the other way round."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.swapped = nn.Linear(4, 4), nn.Linear(4, 4), swapped

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        first, second = (q, p) if self.swapped else (p, q)
        return self.a(first) - self.b(second)  # type: ignore[no-any-return]


def test_one_tensor_given_for_two_inputs_makes_two_inputs(tmp_path: Path) -> None:
    h, other = torch.rand(2, 4), torch.rand(2, 4)
    model = Difference(swapped=False)
    assert verify(model, Difference(swapped=False), (h, h)).ok
    assert not verify(model, Difference(swapped=True), (h, h)).ok
    export_module(model, (h, h), tmp_path / "model.onnx")
    assert verify(model, tmp_path / "model.onnx", (h, other)).ok


def test_empty_outputs_prove_nothing() -> None:
    report = verify(nn.Linear(4, 3), nn.Linear(4, 3), (torch.rand(0, 4),))
    assert not report.ok
    assert "the outputs are empty, so nothing was compared: give inputs with at least one sample" in str(report)


class GivesItsBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.b(self.a(x)), self.a.bias


def test_a_bias_that_is_an_output_has_the_dense_name() -> None:
    model, x = GivesItsBias().double(), torch.rand(2, 8, dtype=torch.float64)
    low = tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1), example_inputs=(x,))
    assert verify(low, model, (x,)).ok


def test_an_approximation_explains_no_difference_of_kept_layers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.rand(4, 16)
    half = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1, exclude=("2",))
    low, other = tdfx.rewrite(model, half), copy.deepcopy(model)
    assert verify(low, model, (x,)).ok
    with torch.no_grad():
        other.get_parameter("2.weight").mul_(-3)
    report = verify(low, other, (x,))
    assert report.graphs_match
    assert not report.ok
    assert "the first stored tensor that differs is '2.weight': 256 of its 256 values" in str(report)

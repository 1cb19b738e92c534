"""Which graphs tdfx.verify must accept as the same, and each kind of difference that it must report."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
import time
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tdfx.onnx_proof.compare_graphs import Comparison, compare_models
from tdfx.onnx_proof.first_difference import Difference
from tdfx.onnx_proof.graph import read_graph
from tdfx.onnx_proof.isomorphism import isomorphic
from tdfx.onnx_proof.verify import verify
from tdfx.onnx_proof.walk_from_outputs import walk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
from onnx_models import Net, disguise, find, node, small

# --- graphs that match ---------------------------------------------------------------------------------------------------


def test_a_fresh_instance_with_the_same_weights_is_the_same(x: Tensor) -> None:
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    report = verify(model, reference, example_inputs=(x,))
    assert report.ok
    assert report.graphs_match
    assert report.difference is None
    assert report.max_error == 0.0
    assert report.settled_by == "walk"
    assert report.nodes > 10
    assert report.seconds > 0.0
    assert str(report).startswith(
        f"verified\n  same structure ({report.nodes} nodes)\n  same interface\n  same numbers (largest"
    )
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_a_single_tensor_is_accepted_in_place_of_a_tuple(x: Tensor) -> None:
    model = nn.ReLU()
    assert verify(model, model, x).ok


def test_two_files_need_no_inputs(proto: ModelProto, tmp_path: Path) -> None:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for number, path in enumerate(paths):
        onnx.save(disguise(proto, number), path)
    report = verify(paths[0], str(paths[1]))
    assert report.ok
    assert report.max_error < report.tolerance


def test_a_file_and_a_module_are_compared(x: Tensor, net_path: Path) -> None:
    torch.manual_seed(0)
    assert verify(Net(), net_path, (x,)).ok
    report = verify(Net(), net_path, (x,))  # other random weights
    assert report.graphs_match
    assert not report.ok


def test_dynamic_axes_get_a_size(tmp_path: Path) -> None:
    onnx.save(small([node("Relu", "x", "y")], ["y"]), tmp_path / "a.onnx")
    assert verify(tmp_path / "a.onnx", tmp_path / "a.onnx").ok


@pytest.mark.parametrize("seed", range(5))
def test_order_and_inner_names_do_not_matter(proto: ModelProto, seed: int) -> None:
    other = disguise(proto, seed)
    onnx.checker.check_model(other)
    assert [node.op_type for node in other.graph.node] != [node.op_type for node in proto.graph.node]
    assert compare_models(other, proto) == Comparison(None, "walk")


@pytest.mark.parametrize("seed", range(3))
def test_networkx_alone_finds_the_same_match(proto: ModelProto, seed: int) -> None:
    assert isomorphic(read_graph(disguise(proto, seed)), read_graph(proto))


def test_nodes_that_no_output_depends_on_are_settled_by_isomorphism() -> None:
    dead = [node("Neg", "x", "a"), node("Abs", "x", "b"), node("Sub", "a b", "c"), node("Sub", "a b", "d")]
    model = small([*dead, node("Relu", "x", "y")], ["y"])
    assert compare_models(disguise(model, 1), model) == Comparison(None, "isomorphism")


def deep(layers: int) -> ModelProto:
    """Return many equal layers that only differ in their depth."""
    names = ["x", *(f"a{number}" for number in range(layers))]
    return small([node("Relu", name, following) for name, following in itertools.pairwise(names)], [names[-1]])


def test_the_search_takes_time_in_proportion_to_the_depth() -> None:
    """Measured in CPU time; one round of refinement for each layer would take 16 times as long for 4 times the layers."""

    def seconds(layers: int) -> float:
        graphs = read_graph(disguise(deep(layers), 1)), read_graph(deep(layers))
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            assert isomorphic(*graphs)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(1600) < 8 * seconds(400)


def test_symmetric_branches_match(x: Tensor) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.left(x) + self.right(x)
            return out

    model, reference = Branches(), Branches()
    reference.load_state_dict(model.state_dict())
    assert verify(model, reference, (x,)).ok


def test_constants_match_by_value_whatever_their_names_and_encoding() -> None:
    nodes = [node("Reshape", "x lifted_tensor_0", "y")]
    other = [node("Reshape", "x _tensor_constant7", "y")]
    model = small(nodes, ["y"], lifted_tensor_0=np.array([2, -1]))
    reference = small(other, ["y"])
    reference.graph.initializer.append(helper.make_tensor("_tensor_constant7", TensorProto.INT64, [2], [2, -1]))
    assert compare_models(model, reference) == Comparison(None, "walk")


def test_subgraphs_match_whatever_their_inner_names() -> None:
    def branching(prefix: str, scale: float) -> ModelProto:
        def body(op: str) -> onnx.GraphProto:
            out = helper.make_tensor_value_info(f"{prefix}out", TensorProto.FLOAT, None)
            return helper.make_graph(
                [helper.make_node(op, [f"{prefix}pre", f"{prefix}pre"], [out.name])], "b", [], [out]
            )

        flag = helper.make_tensor("f", TensorProto.BOOL, [], [True])
        choice = helper.make_node(
            "If", ["flag"], ["y"], name="choice", then_branch=body("Add"), else_branch=body("Mul")
        )
        pre = helper.make_node("Elu", ["x"], [f"{prefix}pre"], name="pre", alpha=scale)
        return small([helper.make_node("Constant", [], ["flag"], value=flag), pre, choice], ["y"])

    model = branching("a", 1.0)
    assert compare_models(branching("b", 1.0), model) == Comparison(None, "walk")
    difference = compare_models(branching("b", 2.0), model).difference
    assert difference == "node 'pre' (Elu) has alpha 2.0, but 'pre' in the reference has 1.0"


def test_local_functions_are_inlined() -> None:
    inner = [helper.make_node("Neg", ["a"], ["t"]), helper.make_node("Relu", ["t"], ["b"])]
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "NegRelu", ["a"], ["b"], inner, domains)
    model = small([helper.make_node("NegRelu", ["x"], ["y"], domain="own")], ["y"])
    model.functions.append(function)
    model.opset_import.append(domains[1])
    plain = small([node("Neg", "x", "t"), node("Relu", "t", "y")], ["y"])
    assert [node.op for node in read_graph(model).nodes] == [node.op for node in read_graph(plain).nodes]


# --- graphs that do not match --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            lambda: Net(stride=1),
            r"^node 'node_conv2d' \(Conv\) has strides \[1, 1\], but 'node_conv2d' in the reference has",
        ),
        (lambda: Net(last_relu=False), r"^node '\w+' \(\w+\) stands where the reference has 'node_relu_1' \(Relu\)$"),
        (lambda: Net(kernel=5), r"^initializer 'conv1.weight' has shape \[4, 3, 5, 5\], but \[4, 3, 3, 3\] in the ref"),
        (
            lambda: Net(eps=1e-3),
            r"\(BatchNormalization\) has epsilon 0\.001\d*, but '\w+' in the reference has 9.99\d*e-06$",
        ),
    ],
    ids=["strides", "missing relu", "kernel", "eps"],
)
def test_a_changed_module_is_seen(x: Tensor, net_path: Path, changed: Callable[[], Net], text: str) -> None:
    report = verify(changed(), net_path, (x,))
    assert not report.ok
    assert not report.graphs_match
    assert report.difference is not None
    assert re.search(text, report.difference)
    assert "NOT verified\n  the structures differ: " in str(report)


def test_swapped_operands_are_seen() -> None:
    model = small([node("Neg", "x", "a"), node("Abs", "x", "b"), node("Sub", "b a", "y")], ["y"])
    reference = small([node("Neg", "x", "a"), node("Abs", "x", "b"), node("Sub", "a b", "y")], ["y"])
    assert compare_models(model, reference).difference == (
        "node 'n_y' (Sub) takes output 0 of 'n_b' (Abs) as argument 0, but 'n_y' in the reference "
        "output 0 of 'n_a' (Neg)"
    )
    assert not isomorphic(read_graph(model), read_graph(reference))


def test_swapped_operands_of_a_module_are_seen(x: Tensor) -> None:
    class Minus(nn.Module):
        def __init__(self, swap: bool) -> None:
            super().__init__()
            self.swap = swap

        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.relu(x), torch.tanh(x)
            return b - a if self.swap else a - b

    report = verify(Minus(True), Minus(False), (x,))
    assert report.difference is not None
    assert "(Sub) takes output 0 of 'node_tanh' (Tanh) as argument 0" in report.difference
    assert report.max_error > 1.0


def test_a_reshape_target_is_seen(proto: ModelProto) -> None:
    other = copy.deepcopy(proto)
    constants = [node for node in other.graph.node if node.op_type == "Constant"]
    target = next(node for node in constants for attribute in node.attribute if list(attribute.ints) == [16])
    target.attribute[0].ints[0] = 8
    assert compare_models(other, proto).difference == (
        f"node '{target.name}' (Constant) has value_ints [8], but '{target.name}' in the reference has [16]"
    )


def test_a_stored_integer_is_seen() -> None:
    nodes = [node("Reshape", "x target", "y")]
    models = [small(nodes, ["y"], target=np.array(target)) for target in ([2, -1], [4, -1])]
    assert compare_models(*models).difference == (
        "initializer 'target' is int64[2] of [2, -1], but int64[2] of [4, -1] in the reference"
    )


def test_a_large_constant_is_seen() -> None:
    table = np.arange(100)
    models = [
        small([node("Gather", "x lifted_tensor_0", "y")], ["y"], lifted_tensor_0=values)
        for values in (table, table[::-1])
    ]
    difference = compare_models(*models).difference
    assert difference is not None
    assert re.search(
        r"takes the constant 'lifted_tensor_0', int64\[100\] sha256:\w{16}, as argument 1, but", difference
    )


def test_tensors_that_no_node_reads_are_compared_only_by_name() -> None:
    models = [small([node("Relu", "x", "y")], ["y"], num_batches_tracked=np.array(steps)) for steps in (3, 5)]
    assert compare_models(*models).difference is None
    bare = small([node("Relu", "x", "y")], ["y"])
    assert compare_models(models[0], bare).difference == (
        "initializer 'num_batches_tracked' is not in the reference, which has none"
    )
    assert compare_models(bare, models[0]).difference == (
        "initializer 'num_batches_tracked' of the reference is not in the model"
    )


def test_the_dtype_of_an_initializer_is_seen(proto: ModelProto) -> None:
    other = copy.deepcopy(proto)
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias).astype(np.float16), "fc.bias"))
    assert compare_models(other, proto).difference == (
        "initializer 'fc.bias' has dtype float16, but float in the reference"
    )


def test_a_renamed_initializer_is_seen(proto: ModelProto) -> None:
    other = copy.deepcopy(proto)
    for item in (*other.graph.initializer, find(other, "Gemm")):
        if isinstance(item, NodeProto):
            item.input[2] = "fc.offset"
        elif item.name == "fc.bias":
            item.name = "fc.offset"
    assert str(compare_models(other, proto).difference).startswith(
        "initializer 'fc.offset' is not in the reference, which has 'fc."
    )


def test_a_renamed_output_is_seen(proto: ModelProto) -> None:
    other = copy.deepcopy(proto)
    find(other, "Gemm").output[0] = other.graph.output[0].name = "scores"
    comparison = compare_models(other, proto)
    assert comparison.difference == "output 0 is named 'scores', but 'linear' in the reference"


def port(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (port("x", TensorProto.FLOAT16, ["n", 4]), "input 0, 'x', has dtype float16, but float in the reference"),
        (port("x", TensorProto.FLOAT, [1, 4]), "input 0, 'x', has shape [1, 4], but [?0, 4] in the reference"),
        (port("x", TensorProto.FLOAT, ["n", "n"]), "input 0, 'x', has shape [?0, ?0], but [?0, 4] in the reference"),
        (port("z", TensorProto.FLOAT, ["n", 4]), "input 0 is named 'z', but 'x' in the reference"),
        (port("x", TensorProto.FLOAT, ["n", 4]), None),
    ],
    ids=["dtype", "shape", "axes", "name", "axis renamed"],
)
def test_inputs_are_compared(changed: onnx.ValueInfoProto, text: str | None) -> None:
    reference = small([node("Relu", "x", "y")], ["y"])
    model = small([node("Relu", changed.name, "y")], ["y"])
    model.graph.input[0].CopyFrom(changed)
    assert compare_models(model, reference).difference == text


def test_the_number_of_inputs_and_outputs_is_compared() -> None:
    single = small([node("Relu", "x", "y")], ["y"])
    double = small([node("Relu", "x", "y")], ["y", "y"])
    assert compare_models(double, single).difference == "the model has 2 output(s), the reference 1"
    more = copy.deepcopy(single)
    more.graph.input.append(port("z", TensorProto.FLOAT, [1]))
    assert compare_models(more, single).difference == "the model has 2 input(s), the reference 1"


def test_opsets_are_compared() -> None:
    model, reference = (small([node("Relu", "x", "y")], ["y"]) for _ in range(2))
    model.opset_import[0].version = 18
    assert compare_models(model, reference).difference == "opset 'ai.onnx' has version 18, but 20 in the reference"


@pytest.mark.parametrize(
    ("nodes", "others", "text"),
    [
        (["Split x a,b"], ["Split x a"], "node 'n0' (Split) makes 2 output(s), but 'n0' in the reference 1"),
        (["Clip x,x a"], ["Clip x,,x a"], "node 'n0' (Clip) has 2 input(s), but 'n0' in the reference has 3"),
        (["Clip x,,x a"], ["Clip x,x,x a"], "takes nothing as argument 1, but 'n0' in the reference input 'x'"),
        (["Relu x a", "Abs x d"], ["Relu x a"], "node 'n1' (Abs) has no counterpart in the reference"),
        (["Relu x a"], ["Relu x a", "Abs x d"], "node 'n1' (Abs) of the reference has no counterpart in the model"),
        (["Relu x a", "Abs x d"], ["Relu x a", "Neg x d"], "node 'n1' (Abs) stands where the reference has 'n1' (Neg)"),
        (
            ["Relu x a", "Abs x d", "Abs x e"],
            ["Relu x a", "Abs x d"],
            "has 2 node(s) that compute what 'n1' (Abs) does",
        ),
        (
            ["Gelu x a approximate"],
            ["Gelu x a"],
            "(Gelu) has approximate 'tanh', but 'n0' in the reference has no approx",
        ),
        (
            ["Gelu x a approximate", "Abs x d"],
            ["Neg x d", "Gelu x a"],
            "'tanh', but 'n1' in the reference has no approx",
        ),
        (["Split x a,b", "Relu b y"], ["Split x a,b", "Relu a y"], "takes output 1 of 'n0' (Split) as argument 0, but"),
        (["Split x a,b", "Split x c,d", "Add b,d y"], ["Split x a,b", "Split x c,d", "Add b,b y"], "stand"),
    ],
)
def test_node_differences_are_named(nodes: list[str], others: list[str], text: str) -> None:
    def build(lines: list[str]) -> ModelProto:
        made_nodes = []
        for number, line in enumerate(lines):
            op, inputs, outputs, *attributes = line.split()
            extra = dict.fromkeys(attributes, "tanh")
            made_nodes.append(helper.make_node(op, inputs.split(","), outputs.split(","), name=f"n{number}", **extra))
        return small(made_nodes, [lines[-1].split()[2].split(",")[0] if "y" in lines[-1] else "a"])

    model, reference = build(nodes), build(others)
    assert text in str(compare_models(model, reference).difference)
    assert not isomorphic(read_graph(model), read_graph(reference))


def test_exchanged_outputs_are_seen() -> None:
    model = small([node("Relu", "x", "a"), node("Abs", "x", "b")], ["a", "b"])
    reference = small([node("Abs", "x", "a"), node("Relu", "x", "b")], ["a", "b"])
    assert (
        compare_models(model, reference).difference
    ) == "the graph's outputs: 'n_b' (Abs) stands where the reference has 'n_b' (Relu)"
    assert not isomorphic(read_graph(model), read_graph(reference))


def test_equal_nodes_that_are_read_by_others_do_not_match() -> None:
    """Every node has a counterpart that computes the same; only which of two equal nodes is read differs."""
    head = [node("Relu", "x", "a"), node("Relu", "x", "b")]
    model = small([*head, node("Add", "a a", "c"), node("Add", "b b", "d"), node("Sub", "c d", "y")], ["y"])
    reference = small([*head, node("Add", "a b", "c"), node("Add", "a b", "d"), node("Sub", "c d", "y")], ["y"])
    comparison = compare_models(model, reference)
    assert comparison.settled_by == "walk"
    assert re.search(r"^argument \d of node 'n_\w' \(Add\): '\w' ", str(comparison.difference))
    assert not isomorphic(read_graph(model), read_graph(reference))


def test_equal_nodes_that_no_output_depends_on_do_not_match_if_read_by_others() -> None:
    head = [node("Relu", "x", "y"), node("Abs", "x", "a"), node("Abs", "x", "b")]
    model = small([*head, node("Add", "a a", "c"), node("Add", "b b", "d")], ["y"])
    reference = small([*head, node("Add", "a b", "c"), node("Add", "a b", "d")], ["y"])
    comparison = compare_models(model, reference)
    text = "the 4 node(s) that no output depends on, from 'n_a' (Abs) on, are wired differently"
    assert comparison == Comparison(Difference(text, 1), "isomorphism")


def rewire(model: ModelProto, generator: random.Random) -> ModelProto:
    """Return a copy in which one argument reads another value that is defined before it."""
    other = copy.deepcopy(model)
    places = [(number, position) for number, node in enumerate(other.graph.node) for position in range(len(node.input))]
    number, position = generator.choice(places)
    values = ["x", *(name for node in other.graph.node[:number] for name in node.output)]
    other.graph.node[number].input[position] = generator.choice(values)
    return other


def random_graph(generator: random.Random, size: int = 8) -> ModelProto:
    values = ["x"]
    nodes = []
    for number in range(size):
        op = generator.choice(["Add", "Sub", "Relu"])
        count = 1 if op == "Relu" else 2
        nodes.append(node(op, " ".join(generator.choice(values) for _ in range(count)), f"v{number}"))
        values.append(f"v{number}")
    return small(nodes, [values[-1]])


def brute_force(model: ModelProto, reference: ModelProto) -> bool:
    """Decide by trying every assignment of nodes, without colours or a walk."""
    nodes, others = model.graph.node, reference.graph.node

    def extend(number: int, names: dict[str, str]) -> bool:
        if number == len(nodes):
            return [names[port.name] for port in model.graph.output] == [port.name for port in reference.graph.output]
        node = nodes[number]
        expected = (node.op_type, [names[name] for name in node.input])
        free = [other for other in others if other.output[0] not in names.values()]
        return any(
            extend(number + 1, {**names, node.output[0]: other.output[0]})
            for other in free
            if (other.op_type, list(other.input)) == expected
        )

    return len(nodes) == len(others) and extend(0, {"x": "x"})


def test_walk_isomorphism_and_brute_force_agree_on_random_graphs() -> None:
    generator = random.Random(0)
    verdicts = []
    for _ in range(300):
        reference = random_graph(generator)
        model = disguise(
            reference if generator.random() < 0.3 else rewire(reference, generator), generator.randrange(99)
        )
        for port in model.graph.output:
            assert port.name == reference.graph.output[0].name
        expected = brute_force(model, reference)
        graphs = read_graph(model), read_graph(reference)
        assert (compare_models(model, reference).difference is None) is expected
        assert isomorphic(*graphs) is expected
        verdicts.append((expected, walk(*graphs).conflict is None))
    assert {(True, True), (False, False), (False, True)} == set(verdicts)

"""Five small architectures, and changes that are planted into their ONNX graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision.models import DenseNet, MobileNetV3, ResNet, SwinTransformer
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock


class Text(nn.Module):
    """A transformer that reads tokens, with its attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.place = nn.Parameter(torch.randn(1, 6, 16))
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).transpose(1, 2)
        x = x + self.out((scores - scores.mean(-1, keepdim=True)).softmax(-1) @ self.value(y))
        x = x + self.narrow(torch.relu(self.wide(self.norm2(x))))
        logits: Tensor = self.head(torch.cat([x.mean(1), x.amax(1) * 0.5], -1)[:, :16])
        return logits


def _mobilenet() -> nn.Module:
    row = partial(InvertedResidualConfig, width_mult=1.0)
    rows = [
        row(8, 3, 16, 8, True, "RE", 2, 1),
        row(8, 3, 24, 8, False, "HS", 1, 1),
        row(8, 5, 24, 16, True, "HS", 2, 1),
    ]
    model: nn.Module = MobileNetV3(rows, last_channel=32, num_classes=10, dropout=0.0)
    return model


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10, width_per_group=64),
    "densenet": lambda: DenseNet(8, (2, 2), 16, num_classes=10),
    "mobilenet": _mobilenet,
    "swin": lambda: SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=10, stochastic_depth_prob=0.0),
    "text": Text,
}


def inputs_of(name: str) -> Tensor:
    if name == "text":
        return torch.randint(50, (2, 6))
    return torch.randn(2, 3, 32, 32)


# --- Changes: each function changes a graph in place and returns the name of what it changed, or None if it cannot ----

Plant = Callable[[ModelProto], str | None]


def _nodes(model: ModelProto, *operators: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type in operators]


def _last(model: ModelProto, *operators: str) -> NodeProto | None:
    nodes = _nodes(model, *operators)
    return nodes[-1] if nodes else None


def swap_operands(model: ModelProto) -> str | None:
    """Exchange two arguments whose order matters: of a - b, or mean and variance."""
    places = {"Sub": (0, 1), "Div": (0, 1), "BatchNormalization": (3, 4), "LayerNormalization": (1, 2)}
    node = _last(model, "Sub") or _last(model, "BatchNormalization") or _last(model, "Div", "LayerNormalization")
    assert node is not None
    first, second = places[node.op_type]
    node.input[first], node.input[second] = node.input[second], node.input[first]
    return str(node.name)


def swap_operands_of_add(model: ModelProto) -> str | None:
    node = next((node for node in _nodes(model, "Add", "Mul") if node.input[0] != node.input[1]), None)
    if node is None:
        return None  # a DenseNet has no addition
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return str(node.name)


def read_twice(model: ModelProto) -> str | None:
    """Make an addition add its first value to itself."""
    node = _last(model, "Add")
    if node is None:
        return None
    node.input[1] = node.input[0]
    return str(node.name)


def change_attribute(model: ModelProto) -> str | None:
    node = _last(model, "BatchNormalization", "LayerNormalization")
    assert node is not None
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f *= 1.5
    return str(node.name)


def perturb_weight(model: ModelProto) -> str | None:
    """Add the largest value of the last bias to one of its values."""
    gemm = _last(model, "Gemm")
    assert gemm is not None
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == gemm.input[2])
    values = numpy_helper.to_array(tensor).copy()
    values.flat[values.size // 2] += np.abs(values).max()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return str(tensor.name)


def drop_activation(model: ModelProto) -> str | None:
    """Remove a ReLU, or the activation that the model uses instead."""
    node = _last(model, "Relu", "HardSwish", "Gelu")
    assert node is not None
    for reader in model.graph.node:
        reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
    model.graph.node.remove(node)
    return str(node.name)


def _change_ints(model: ModelProto, name: str, values: Callable[[list[int]], list[int]]) -> str | None:
    for node in reversed(_nodes(model, "Conv", "MaxPool", "AveragePool")):
        attributes = [
            attribute
            for attribute in node.attribute
            if attribute.name == name and attribute.type == AttributeProto.INTS
        ]
        if attributes:
            changed = values(list(attributes[0].ints))
            attributes[0].ints[:] = changed
            return str(node.name)
    return None


def other_strides(model: ModelProto) -> str | None:
    return _change_ints(model, "strides", lambda sizes: [size + 1 for size in sizes])


def other_padding(model: ModelProto) -> str | None:
    return _change_ints(model, "pads", lambda sizes: [size + 1 for size in sizes])


def other_dilation(model: ModelProto) -> str | None:
    return _change_ints(model, "dilations", lambda sizes: [size + 1 for size in sizes])


def drop_bias(model: ModelProto) -> str | None:
    gemm = _last(model, "Gemm")
    assert gemm is not None
    del gemm.input[2:]
    return str(gemm.name)


def add_node(model: ModelProto) -> str | None:
    """Insert a node before the last one."""
    gemm = _last(model, "Gemm")
    assert gemm is not None
    node = helper.make_node("Relu", [gemm.input[0]], ["planted"], name="planted")
    model.graph.node.insert(list(model.graph.node).index(gemm), node)
    gemm.input[0] = "planted"
    return str(node.name)


def swap_concat(model: ModelProto) -> str | None:
    constants = {name for node in _nodes(model, "Constant") for name in node.output}
    nodes = [node for node in _nodes(model, "Concat") if len(node.input) > 1 and not constants.intersection(node.input)]
    if not nodes:
        return None
    node = nodes[-1]
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return str(node.name)


def other_permutation(model: ModelProto) -> str | None:
    node = next((node for node in _nodes(model, "Transpose") if len(node.attribute[0].ints) > 2), None)
    if node is None:
        return None
    order = list(node.attribute[0].ints)
    node.attribute[0].ints[:] = [*order[:-2], order[-1], order[-2]]
    return str(node.name)


def rename_output(model: ModelProto) -> str | None:
    port = model.graph.output[0]
    for node in model.graph.node:
        node.output[:] = ["scores" if name == port.name else name for name in node.output]
    port.name = "scores"
    return "scores"


def rename_input(model: ModelProto) -> str | None:
    port = model.graph.input[0]
    for node in model.graph.node:
        node.input[:] = ["image" if name == port.name else name for name in node.input]
    port.name = "image"
    return "image"


def other_input_shape(model: ModelProto) -> str | None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value += 1
    return str(model.graph.input[0].name)


def dynamic_axis(model: ModelProto) -> str | None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return str(model.graph.input[0].name)


def other_input_dtype(model: ModelProto) -> str | None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    return str(model.graph.input[0].name)


def other_output_dtype(model: ModelProto) -> str | None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    return str(model.graph.output[0].name)


def other_weight_dtype(model: ModelProto) -> str | None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT and tensor.dims)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return str(tensor.name)


def other_opset(model: ModelProto) -> str | None:
    model.opset_import[0].version -= 1
    return "opset 'ai.onnx'"


def reverse_initializers(model: ModelProto) -> str | None:
    """Reverse the order of stored tensors, which must make no difference."""
    tensors = [copy.deepcopy(tensor) for tensor in model.graph.initializer]
    del model.graph.initializer[:]
    model.graph.initializer.extend(reversed(tensors))
    return None


STRUCTURAL: tuple[Plant, ...] = (
    swap_operands,
    swap_operands_of_add,
    read_twice,
    change_attribute,
    drop_activation,
    other_strides,
    other_padding,
    other_dilation,
    drop_bias,
    add_node,
    swap_concat,
    other_permutation,
    other_weight_dtype,
    other_opset,
)
INTERFACIAL: tuple[Plant, ...] = (
    rename_output,
    rename_input,
    other_input_shape,
    dynamic_axis,
    other_input_dtype,
    other_output_dtype,
)

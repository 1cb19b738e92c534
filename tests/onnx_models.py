"""Networks and ONNX graphs that the tests of the ONNX proof share."""

from __future__ import annotations

import copy
import heapq
import random
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn


class Net(nn.Module):
    """A strided convolution, BatchNorm, a residual addition, a reshape and a linear layer."""

    def __init__(self, stride: int = 2, kernel: int = 3, eps: float = 1e-5, last_relu: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(4, eps=eps)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(16, 5)
        self.last_relu = last_relu

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv1(x)))
        y = self.conv2(y) + y
        if self.last_relu:
            y = torch.relu(y)
        out: Tensor = self.fc(self.pool(y).reshape(-1, 16))
        return out


def small(nodes: list[NodeProto], outputs: list[str], **constants: np.ndarray) -> ModelProto:
    """Return a graph of the given nodes and initializers, with input ``x`` and outputs of unknown shape."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"n_{outputs.split()[0]}", **attributes)


def find(model: ModelProto, op: str) -> NodeProto:
    first: NodeProto = next(node for node in model.graph.node if node.op_type == op)
    return first


def disguise(model: ModelProto, seed: int) -> ModelProto:
    """Return the same graph with its nodes in another valid order, and with new names for nodes and inner values."""
    result = copy.deepcopy(model)
    generator = random.Random(seed)
    outer = {
        item.name for items in (result.graph.input, result.graph.output, result.graph.initializer) for item in items
    }
    inner = [output for node in result.graph.node for output in node.output if output not in outer]
    generator.shuffle(inner)
    names = {name: f"v{number}" for number, name in enumerate(inner)}
    waiting = [(generator.random(), number, node) for number, node in enumerate(result.graph.node)]
    computed = set(outer) - {port.name for port in result.graph.output} | {""}
    heapq.heapify(waiting)
    ordered: list[NodeProto] = []
    while waiting:
        _, number, node = heapq.heappop(waiting)
        if computed.issuperset(node.input):
            ordered.append(node)
            computed.update(node.output)
        else:
            heapq.heappush(waiting, (generator.random() + len(ordered) + 1, number, node))
    ordered = copy.deepcopy(ordered)
    for number, node in enumerate(ordered):
        node.name = f"node_{number}"
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.node.extend(ordered)
    return result

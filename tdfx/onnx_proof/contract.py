"""Contract each chain of factors to one node, and the layer it stands for likewise, so that the two can be compared.

Where a chain begins and ends is read off the tensors that the rewrite recorded by name, never guessed from nodes that
happen to follow one another. What lies between is taken together: factors, the padding that a layer does by itself, the
zeros that the exporter writes for a missing bias.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tdfx.onnx_proof.geometry import CONVOLUTIONS, PRODUCTS, geometry_of, is_turned, operator_of
from tdfx.onnx_proof.graph import Graph, Initializer, Node, sources_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from tdfx.onnx_proof.chains import Chain

_LAYOUT = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that hand a weight on as it is, in another form."""

_HANDING_ON = {"Identity", "Pad", "Squeeze", "Unsqueeze"}
"""Operators that the data may go through between factors."""

_HELPERS = {*_LAYOUT, "CastLike", "Constant", "Expand", "Shape"}
"""Operators that hand a chain its weights, and the zeros for a missing bias."""

_ZERO = re.compile(r"(^|of )-?0(\.0)?$")

SUFFIX = " site"
"""What the operator of a contracted node ends with."""


class ContractionError(Exception):
    """A chain that is not one: what was found in its place, and where."""

    def __init__(self, text: str, node: int | None = None) -> None:
        super().__init__(text)
        self.node = node


@dataclass(frozen=True, slots=True)
class Contracted:
    """A graph with some sites contracted, and how many nodes each of them had."""

    graph: Graph
    sizes: dict[str, tuple[int, ...]]
    """Site -> the number of nodes that were made one, for each place where the site is computed."""


@dataclass(frozen=True, slots=True)
class _Form:
    """One site as a graph has it: names of its tensors."""

    chain: Chain
    weights: tuple[str, ...]
    bias: str | None


def differing(own: Iterable[Chain], others: Iterable[Chain]) -> tuple[Chain, ...]:
    """Return the chains that only one of two graphs has, or that they have at other ranks, one for each site."""
    mine, theirs = ({one.site: one for one in some} for some in (own, others))
    return tuple(one for site, one in {**theirs, **mine}.items() if mine.get(site) != theirs.get(site))


def contract(graph: Graph, chains: Iterable[Chain]) -> Contracted:
    """Return ``graph`` with one node for each place where a site of ``chains`` is computed, factorized or dense.

    Raises:
        ContractionError: if the graph does not compute a site the way that was recorded.

    """
    factorized = {one.site: one for one in graph.chains}
    work = _Work(graph)
    for dense in chains:
        own = factorized.get(dense.site)
        if own is not None:
            work.site(_Form(own, own.factors, own.factor_bias))
        else:
            work.site(_Form(dense, (dense.weight,), dense.bias))
    return work.result()


class _Work:
    """The nodes to go, and what comes in their place."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(graph.nodes):
            for name in filter(None, node.inputs):
                self.readers[name].append(index)
        self.results = {port.name for port in graph.outputs}
        self.gone: set[int] = set()
        self.made: dict[int, Node] = {}
        self.initializers = dict(graph.initializers)
        self.sizes: dict[str, tuple[int, ...]] = {}

    def site(self, form: _Form) -> None:
        """Contract one site wherever it is computed; in eval mode, to which an export is bound, that may be nowhere."""
        products = [self._products(form, name) for name in form.weights]
        sizes = []
        for last in sorted(products[-1]):
            path = self._path(form, self._with_bias(form, last), products)
            region = self._region(form, path)
            self._replace(form, path, region, products)
            sizes.append(len(region))
        self.sizes[form.chain.site] = tuple(sizes)
        self._rename(form)

    def _products(self, form: _Form, name: str) -> dict[int, bool]:
        """Return the nodes that multiply by a weight, in whatever form it reaches them, and whether transposed."""
        found: dict[int, bool] = {}
        waiting = [(name, False)]
        while waiting:
            value, turned = waiting.pop()
            for index in self.readers[value]:
                node = self.graph.nodes[index]
                if node.op in CONVOLUTIONS | PRODUCTS:
                    found[index] = turned ^ is_turned(node)
                elif node.op in _LAYOUT:
                    waiting.extend((output, turned ^ (node.op == "Transpose")) for output in node.outputs if output)
                elif node.op != "Shape":
                    raise ContractionError(f"the weight {name!r} of the site {form.chain} is read by {node}", index)
        return found

    def _with_bias(self, form: _Form, tail: int) -> int:
        """Return the node that adds the bias, where that is another one than the last to multiply."""
        if form.bias is None or form.bias in self.graph.nodes[tail].inputs:
            return tail
        after = self.readers[self.graph.nodes[tail].outputs[0]]
        found = [
            one for one in after if self.graph.nodes[one].op == "Add" and form.bias in self.graph.nodes[one].inputs
        ]
        if len(found) != 1:
            raise ContractionError(f"the bias {form.bias!r} of the site {form.chain} is not added to its result", tail)
        return found[0]

    def _path(self, form: _Form, tail: int, products: Sequence[Container[int]]) -> list[int]:
        """Return the nodes through which the data goes, from the first: one product for each weight, in their order."""
        path, left = [tail], len(products)
        while True:
            index = path[-1]
            node = self.graph.nodes[index]
            if node.op in CONVOLUTIONS | PRODUCTS and index in products[left - 1]:
                self._check_added(form, index)
                left -= 1
            elif node.op not in _HANDING_ON and not (node.op == "Add" and index == tail):
                raise ContractionError(f"{node} stands inside the site {form.chain}", index)
            maker = self.graph.maker(self._data_of(form, node))
            if left == 0:
                is_own = form.chain.pads and maker is not None and self.graph.nodes[maker].op == "Pad"
                return [*([maker] if is_own and maker is not None else []), *reversed(path)]
            if maker is None:
                raise ContractionError(f"the site {form.chain} reads {node.inputs[0]!r} on the way", index)
            path.append(maker)

    def _data_of(self, form: _Form, node: Node) -> str:
        """Return the value that a node on the path takes from the one before it."""
        return node.inputs[1] if node.op == "Add" and node.inputs[0] == form.bias else node.inputs[0]

    def _check_added(self, form: _Form, index: int) -> None:
        """Raise an error unless what a product adds is a tensor by name, or the exporter's zeros."""
        for name in filter(None, self.graph.nodes[index].inputs[2:]):
            value, maker = name, self.graph.maker(name)
            while maker is not None and self.graph.nodes[maker].op in {"CastLike", "Expand"}:
                value = self.graph.nodes[maker].inputs[0]
                maker = self.graph.maker(value)
            texts = [one.text for one in self.graph.nodes[maker].attributes] if maker is not None else []
            zeros = len(texts) == 1 and _ZERO.search(texts[0]) is not None
            if not zeros and value not in self.graph.initializers:
                raise ContractionError(f"the site {form.chain} adds {value!r}, which is not its bias", index)

    def _region(self, form: _Form, path: Sequence[int]) -> set[int]:
        """Return the nodes of a path, with those that hand it its weights and zeros."""
        data = self.graph.nodes[path[0]].inputs[0]
        found: set[int] = set()
        waiting = [path[-1]]
        while waiting:
            index = waiting.pop()
            node = self.graph.nodes[index]
            if index not in path and node.op not in _HELPERS:
                raise ContractionError(f"{node} has a part in the site {form.chain}", index)
            found.add(index)
            makers = (self.graph.maker(name) for name in node.inputs if name and name != data)
            waiting.extend(one for one in makers if one is not None and one not in found)
        return self._without_shared(form, found, path)

    def _without_shared(self, form: _Form, found: set[int], path: Sequence[int]) -> set[int]:
        """Leave to the others what they read too: the exporter keeps equal constants once."""
        kept = set(found)
        for index in sorted(found - {path[-1]}, reverse=True):
            outputs = [name for name in self.graph.nodes[index].outputs if name]
            if any(name in self.results or not kept.issuperset(self.readers[name]) for name in outputs):
                if index in path:
                    text = f"a value inside the site {form.chain}, {outputs[0]!r}, is read elsewhere too"
                    raise ContractionError(text, index)
                kept.discard(index)
        return kept

    def _replace(
        self, form: _Form, path: Sequence[int], region: set[int], products: Sequence[Mapping[int, bool]]
    ) -> None:
        nodes = [self.graph.nodes[index] for index in path]
        own = {*form.weights, form.bias}
        others = (name for node in nodes for name in node.inputs if name in self.graph.initializers)
        extra = dict.fromkeys(name for name in others if name not in own)
        turned = [some[index] for index in path for some in products if index in some] if form.chain.oriented else []
        self.gone |= region
        self.made[path[-1]] = Node(
            name=form.chain.site or "the model itself",
            op=operator_of(nodes) + SUFFIX,
            attributes=geometry_of(nodes, self.graph, sorted(set(turned))),
            inputs=tuple(filter(None, (nodes[0].inputs[0], form.chain.weight, form.chain.bias, *extra))),
            outputs=nodes[-1].outputs[:1],
        )

    def _rename(self, form: _Form) -> None:
        """Let the dense tensors stand in place of the factors."""
        first = self.graph.initializers.get(form.weights[0])
        bias = self.graph.initializers.get(form.bias or "")
        for name in (*form.weights, form.bias):
            self.initializers.pop(name or "", None)
        if first is not None:
            shape = form.chain.shape if len(form.weights) > 1 else first.shape
            self.initializers[form.chain.weight] = Initializer(form.chain.weight, first.dtype, shape, None, False)
        if bias is not None and form.chain.bias is not None:
            self.initializers[form.chain.bias] = replace(bias, name=form.chain.bias)

    def result(self) -> Contracted:
        """Return the graph as it is now, without what only contracted nodes have read."""
        gone = self.gone | self._dead()
        nodes = tuple(
            self.made.get(index, node)
            for index, node in enumerate(self.graph.nodes)
            if index in self.made or index not in gone
        )
        # Tensors that nothing reads are exported or not, depending on whether the model is a graph already.
        read = {name for node in nodes for name in node.inputs} | self.results
        initializers = {name: one for name, one in self.initializers.items() if name in read}
        sources = sources_of(self.graph.inputs, initializers, nodes, self.graph.outputs)
        graph = replace(self.graph, nodes=nodes, initializers=initializers, sources=sources, chains=())
        return Contracted(graph, self.sizes)

    def _dead(self) -> set[int]:
        """Return the nodes whose last readers are gone."""
        dead: set[int] = set()
        kept = {name for node in self.made.values() for name in node.inputs} | self.results
        waiting = self._makers(self.gone)
        while waiting:
            index = waiting.pop()
            outputs = [name for name in self.graph.nodes[index].outputs if name]
            read = any(name in kept or not (self.gone | dead).issuperset(self.readers[name]) for name in outputs)
            if index not in self.gone | dead and not read:
                dead.add(index)
                waiting.extend(self._makers([index]))
        return dead

    def _makers(self, indices: Iterable[int]) -> list[int]:
        found = (self.graph.maker(name) for index in indices for name in self.graph.nodes[index].inputs)
        return [one for one in found if one is not None]


def described(
    chains: Sequence[Chain], sizes: dict[str, tuple[int, ...]], others: dict[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Say of each contracted chain what it was, and how many nodes became one on either side."""
    lines = []
    for chain in chains:
        counts = [sorted(set(some[chain.site])) for some in (sizes, others)]
        calls = len(sizes[chain.site])
        if not any(counts):
            lines.append(f"{chain}: not computed in eval mode")
            continue
        nodes = " and ".join("/".join(map(str, some)) or "no" for some in counts)
        lines.append(f"{chain}: {nodes} nodes are one{f', at {calls} places' if calls > 1 else ''}")
    return tuple(lines)

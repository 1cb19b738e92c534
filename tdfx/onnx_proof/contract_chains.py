"""Contract each chain of factors to one node, and the layer that it replaces too, so that the two can be compared.

A chain begins and ends at the tensors that the rewrite recorded by name; it is never guessed from the order of nodes.
Everything in between is contracted: the factors, the padding that a layer does by a node of its own, and the zeros that the
exporter writes for a missing bias.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tdfx.onnx_proof.chain_geometry import CONVOLUTIONS, PRODUCTS, geometry_of, operator_of, transposes_weight
from tdfx.onnx_proof.graph import Graph, Initializer, Node, sources_of
from tdfx.onnx_proof.product_terms import Axes, Terms, dense_axes, factor_axes, joined, permuted, selected, terms_of
from tdfx.onnx_proof.value_text import Attribute

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tdfx.onnx_proof.factor_chains import Chain

_LAYOUT = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that pass a weight on in another layout."""

_PASS_THROUGH = {"Identity", "Pad", "Squeeze", "Unsqueeze"}
"""Operators that the data may go through between factors."""

_HELPERS = {*_LAYOUT, "CastLike", "Concat", "Constant", "Expand", "Gather", "Shape"}
"""Operators that provide a chain's weights, and the zeros for a missing bias."""

_ZERO = re.compile(r"(^|of )-?0(\.0)?$")
_INDEX = re.compile(r"(?:int64\[\] of )?(-?\d+)")

SUFFIX = " site"
"""The end of a contracted node's operator name."""


class ContractionError(Exception):
    """A graph that does not compute a site as recorded: what stands there instead, and at which node."""

    def __init__(self, text: str, node: int) -> None:
        super().__init__(text)
        self.node = node


Sizes = dict[str, tuple[int, ...]]
"""Site -> the number of nodes that became one, for each place where the site is computed."""


@dataclass(frozen=True, slots=True)
class _Product:
    """How a node multiplies by a weight."""

    transposed: bool
    """True if the weight is transposed on its way."""
    terms: Terms | None
    """What a parameter is multiplied by, axis by axis; None for other sites."""
    data: int
    """The position of the argument that is multiplied."""


@dataclass(frozen=True, slots=True)
class _SiteTensors:
    """The names of one site's tensors in a graph, factorized or dense."""

    chain: Chain
    weights: tuple[str, ...]
    bias: str | None
    pads: bool
    """True if an operation of its own pads the input before the first product."""

    def axes(self, position: int) -> Axes | None:
        """Return the names of the axes of a weight that is multiplied as a parameter; None for other sites."""
        roles = self.chain.roles
        if roles is None:
            return None
        return factor_axes(roles)[position] if len(self.weights) > 1 else dense_axes(roles)


def differing_chains(chains: Iterable[Chain], others: Iterable[Chain]) -> tuple[Chain, ...]:
    """Return the chains that only one of two graphs has, or that they have at other ranks, one for each site."""
    by_site, others_by_site = ({chain.site: chain for chain in side} for side in (chains, others))
    sites = {**others_by_site, **by_site}
    return tuple(chain for site, chain in sites.items() if by_site.get(site) != others_by_site.get(site))


def contract(graph: Graph, chains: Iterable[Chain]) -> tuple[Graph, Sizes]:
    """Return ``graph`` with one node for each place where a site of ``chains`` is computed, factorized or dense.

    Raises:
        ContractionError: The graph does not compute a site as it was recorded.
    """
    factorized = {chain.site: chain for chain in graph.chains}
    contraction = _Contraction(graph)
    for chain in chains:
        own = factorized.get(chain.site)
        if own is not None:
            pads = own.pads if own.first_pads is None else own.first_pads
            contraction.contract_site(_SiteTensors(own, own.factors, own.factor_bias, pads))
        else:
            contraction.contract_site(_SiteTensors(chain, (chain.weight,), chain.bias, chain.pads))
    return contraction.result()


class _Contraction:
    """The nodes to remove from a graph, and the nodes that replace them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(graph.nodes):
            for name in filter(None, node.inputs):
                self.readers[name].append(index)
        self.outputs = {port.name for port in graph.outputs}
        self.removed: set[int] = set()
        self.contracted: dict[int, Node] = {}
        """Index of the last node that was contracted -> the node in its place."""
        self.initializers = dict(graph.initializers)
        self.sizes: Sizes = {}
        self.renamed: dict[str, str] = {}
        """Name of a bias in the graph -> its name in the dense model; a layer that is no site may share it."""

    def contract_site(self, site: _SiteTensors) -> None:
        """Contract one site wherever it is computed; a site that only training computes is nowhere in the graph."""
        if site.bias is not None and site.chain.bias is not None:  # sites that share a bias still share it afterwards
            name = self.renamed.setdefault(site.bias, site.chain.bias)
            site = replace(site, chain=replace(site.chain, bias=name))
        products = [self._products(site, name, site.axes(position)) for position, name in enumerate(site.weights)]
        regions = []
        for last in sorted(products[-1]):
            path = self._path(site, self._with_bias(site, last), products)
            regions.append(self._region(site, path, products))
            self._replace(site, path, regions[-1], products)
        self.sizes[site.chain.site] = tuple(map(len, regions))
        self._rename(site)

    def _products(self, site: _SiteTensors, name: str, axes: Axes | None) -> dict[int, _Product]:
        """Return the nodes that multiply by a weight, in whatever layout."""
        products: dict[int, _Product] = {}
        waiting = [(name, False, axes)]
        while waiting:
            value, transposed, axes = waiting.pop()
            for index in self.readers[value]:
                node = self.graph.nodes[index]
                operand = node.inputs.index(value)
                terms = None if axes is None else terms_of(node, axes, operand)
                if node.op in CONVOLUTIONS | PRODUCTS and (terms is not None or (axes is None and node.op != "Einsum")):
                    products[index] = _Product(transposed ^ transposes_weight(node), terms, 1 - operand if terms else 0)
                elif node.op in _LAYOUT:
                    is_transpose = node.op == "Transpose"
                    following = permuted(axes, node) if is_transpose and axes is not None else axes
                    waiting += [(output, transposed ^ is_transpose, following) for output in node.outputs if output]
                elif node.op == "Gather" and axes and (slice_index := self._index(node.inputs[1])):
                    waiting.append((node.outputs[0], transposed, selected(axes, node, slice_index)))
                elif node.op != "Shape":
                    raise ContractionError(f"the weight {name!r} of the site {site.chain} is read by {node}", index)
        return products

    def _index(self, name: str) -> str:
        """Return the one index that a value holds as a text; "" for any other value."""
        stored, producer = self.graph.initializers.get(name), self.graph.producer(name)
        texts = [stored.value or ""] if stored else []
        if producer is not None and self.graph.nodes[producer].op == "Constant":
            texts = [attribute.text for attribute in self.graph.nodes[producer].attributes]
        match = _INDEX.fullmatch(texts[0]) if texts else None
        return match[1] if match else ""

    def _with_bias(self, site: _SiteTensors, last: int) -> int:
        """Return the node that adds the bias, if that is another node than the last one to multiply."""
        if site.bias is None or site.bias in self.graph.nodes[last].inputs:
            return last
        readers = self.readers[self.graph.nodes[last].outputs[0]]
        nodes = self.graph.nodes
        additions = [index for index in readers if nodes[index].op == "Add" and site.bias in nodes[index].inputs]
        if len(additions) != 1:
            raise ContractionError(f"the bias {site.bias!r} of the site {site.chain} is not added to its result", last)
        return additions[0]

    def _path(self, site: _SiteTensors, last: int, products: Sequence[Mapping[int, _Product]]) -> list[int]:
        """Return the nodes that the data goes through, from the first: one product for each weight, in their order."""
        path, remaining = [last], len(products)
        while True:
            index = path[-1]
            node = self.graph.nodes[index]
            data = 0
            if node.op in CONVOLUTIONS | PRODUCTS and index in products[remaining - 1]:
                self._check_addend(site, index)
                remaining -= 1
                data = products[remaining][index].data
            elif node.op not in _PASS_THROUGH and not (node.op == "Add" and index == last):
                raise ContractionError(f"{node} stands inside the site {site.chain}", index)
            if node.op == "Add" and node.inputs[0] == site.bias:
                data = 1
            producer = self.graph.producer(node.inputs[data])
            if remaining == 0:
                if site.pads and producer is not None and self.graph.nodes[producer].op == "Pad":
                    path.append(producer)
                return path[::-1]
            if producer is None:
                raise ContractionError(f"the site {site.chain} reads {node.inputs[0]!r} on the way", index)
            path.append(producer)

    def _check_addend(self, site: _SiteTensors, index: int) -> None:
        """Raise ContractionError unless a product adds only a stored tensor, or the exporter's zeros."""
        for name in filter(None, self.graph.nodes[index].inputs[2:]):
            value, producer = name, self.graph.producer(name)
            while producer is not None and self.graph.nodes[producer].op in {"CastLike", "Expand"}:
                value = self.graph.nodes[producer].inputs[0]
                producer = self.graph.producer(value)
            attributes = self.graph.nodes[producer].attributes if producer is not None else ()
            is_zero = len(attributes) == 1 and _ZERO.search(attributes[0].text) is not None
            if not is_zero and value not in self.graph.initializers:
                raise ContractionError(f"the site {site.chain} adds {value!r}, which is not its bias", index)

    def _data(self, path: Sequence[int], products: Sequence[Mapping[int, _Product]]) -> str:
        """Return the value that enters a path."""
        first = products[0].get(path[0])
        return self.graph.nodes[path[0]].inputs[0 if first is None else first.data]

    def _region(self, site: _SiteTensors, path: Sequence[int], products: Sequence[Mapping[int, _Product]]) -> set[int]:
        """Return the nodes of a path and those that provide its weights and zeros, without nodes that others read too."""
        data = self._data(path, products)
        region: set[int] = set()
        waiting = [path[-1]]
        while waiting:
            index = waiting.pop()
            node = self.graph.nodes[index]
            if index not in path and node.op not in _HELPERS:
                raise ContractionError(f"{node} has a part in the site {site.chain}", index)
            region.add(index)
            producers = (self.graph.producer(name) for name in node.inputs if name != data)
            waiting.extend(producer for producer in producers if producer is not None and producer not in region)
        for index in sorted(region - {path[-1]}, reverse=True):  # the exporter stores equal constants once
            outputs = [name for name in self.graph.nodes[index].outputs if name]
            if any(name in self.outputs or not region.issuperset(self.readers[name]) for name in outputs):
                if index in path:
                    text = f"a value inside the site {site.chain}, {outputs[0]!r}, is read elsewhere too"
                    raise ContractionError(text, index)
                region.discard(index)
        return region

    def _replace(
        self, site: _SiteTensors, path: Sequence[int], region: set[int], products: Sequence[Mapping[int, _Product]]
    ) -> None:
        nodes = [self.graph.nodes[index] for index in path]
        own_tensors = {*site.weights, site.bias}
        read = (name for node in nodes for name in node.inputs if name in self.graph.initializers)
        extra = dict.fromkeys(name for name in read if name not in own_tensors)
        used = [nodes_of[index] for index in path for nodes_of in products if index in nodes_of]
        transposed = {product.transposed for product in used}
        attributes = geometry_of(nodes, self.graph, sorted(transposed) if site.chain.oriented else [])
        if site.chain.roles is not None:
            terms = joined([product.terms for product in used if product.terms is not None])
            if terms is None:
                raise ContractionError(f"the products of the site {site.chain} do not fit together", path[-1])
            attributes = (*geometry_of(nodes, self.graph), Attribute("terms", "STRING", str(terms)))
        self.removed |= region
        self.contracted[path[-1]] = Node(
            name=site.chain.site or "the model itself",
            op=operator_of(nodes) + SUFFIX,
            attributes=attributes,
            inputs=tuple(filter(None, (self._data(path, products), site.chain.weight, site.chain.bias, *extra))),
            outputs=nodes[-1].outputs[:1],
        )

    def _rename(self, site: _SiteTensors) -> None:
        """Replace the site's stored tensors by the dense weight and bias."""
        first = self.graph.initializers.get(site.weights[0])
        bias = self.graph.initializers.get(site.bias or "")
        for name in (*site.weights, site.bias):
            self.initializers.pop(name or "", None)
        if first is not None:
            shape = site.chain.shape if len(site.weights) > 1 else first.shape
            self.initializers[site.chain.weight] = Initializer(site.chain.weight, first.dtype, shape, None, False)
        if bias is not None and site.chain.bias is not None:
            self.initializers[site.chain.bias] = replace(bias, name=site.chain.bias)

    def result(self) -> tuple[Graph, Sizes]:
        """Return the contracted graph, without nodes and tensors that only removed nodes read."""
        removed = self._with_dead()
        kept = (index for index in range(len(self.graph.nodes)) if index in self.contracted or index not in removed)
        nodes = tuple(self._renamed(self.contracted.get(index, self.graph.nodes[index])) for index in kept)
        # Whether tensors that nothing reads are exported depends on whether the model is a graph already.
        outputs = tuple(replace(port, name=self.renamed.get(port.name, port.name)) for port in self.graph.outputs)
        read = {name for node in nodes for name in node.inputs} | {port.name for port in outputs}
        initializers = {name: tensor for name, tensor in self.initializers.items() if name in read}
        sources = sources_of(self.graph.inputs, initializers, nodes, outputs)
        graph = replace(self.graph, nodes=nodes, initializers=initializers, outputs=outputs, sources=sources, chains=())
        return graph, self.sizes

    def _renamed(self, node: Node) -> Node:
        return replace(node, inputs=tuple(self.renamed.get(name, name) for name in node.inputs))

    def _with_dead(self) -> set[int]:
        """Return the removed nodes, and the nodes whose last readers were removed."""
        removed = set(self.removed)
        read = {name for node in self.contracted.values() for name in node.inputs} | self.outputs
        for index in reversed(range(len(self.graph.nodes))):
            outputs = self.graph.nodes[index].outputs
            readers = [reader for name in outputs for reader in self.readers[name]]
            if readers and removed.issuperset(readers) and read.isdisjoint(outputs):
                removed.add(index)
        return removed


def describe_contractions(chains: Sequence[Chain], sizes: Sizes, reference_sizes: Sizes) -> tuple[str, ...]:
    """Return a line for each contracted chain: what it was, and how many nodes became one on either side."""
    lines = []
    for chain in chains:
        counts = [sorted(set(side[chain.site])) for side in (sizes, reference_sizes)]
        calls = len(sizes[chain.site])
        if not any(counts):
            lines.append(f"{chain}: not computed in eval mode")
            continue
        nodes = " and ".join("/".join(map(str, side)) or "no" for side in counts)
        lines.append(f"{chain}: {nodes} nodes are one{f', at {calls} places' if calls > 1 else ''}")
    return tuple(lines)

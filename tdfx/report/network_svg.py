"""Draw a network as SVG, one drawing for each piece; the colours are in the page's style sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from tdfx.plans.plan import Plan
from tdfx.plans.table import fold
from tdfx.report.network import Box, Network
from tdfx.report.network_layout import START, Piece, pieces_of

_BOX_WIDTH, _GAP_X, _GAP_Y, _MARGIN = 142, 10, 16, 8
_SITE_HEIGHT, _OPERATION_HEIGHT = 36, 22
_BEND_WIDTH = 14
_MAX_LETTERS = 20
"""Letters that fit into a box."""
_STRAIGHT = 0.5
"""Horizontal distance below which an edge is drawn straight."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """The drawing of one piece."""

    title: str
    svg: Markup
    wide: bool
    """True if it does not fit into a column of the page."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a box, a bend or the start is drawn; ``x`` is its middle."""

    x: float
    top: float
    bottom: float
    width: float


def drawings_of(network: Network, plan: Plan) -> list[Drawing]:
    """Return the drawings of a network, which show what the plan changes."""
    rewritten = {site.name: f"{site.scheme} {'/'.join(map(str, site.ranks or ()))}" for site in plan.factorized}
    numbers = {site.name: number for number, site in enumerate(plan)}
    pieces = pieces_of(network)
    return [_draw(piece, network, rewritten, numbers, network.ordered and piece is not pieces[-1]) for piece in pieces]


def _draw(
    piece: Piece, network: Network, rewritten: Mapping[str, str], numbers: Mapping[str, int], arrow_below: bool
) -> Drawing:
    places, width, height = _place_all(piece, network)
    parts = [_edge([places[node] for node in way]) for way in piece.edges]
    if arrow_below:
        height += _GAP_Y
        end = places[piece.layers[-1][0]]
        parts.append(_arrow(f"M{end.x:.0f} {end.bottom:.0f}V{height - 1:.0f}", end.x, height - 1))
    boxes = [node for layer in piece.layers for node in layer if node >= 0]
    parts += [_box(network.boxes[node], places[node], piece.title, rewritten, numbers) for node in boxes]
    label = f"{piece.title or 'outermost'}: {len(boxes)} boxes"
    svg = Markup(
        '<svg class="net" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}" role="group" '
    ).format(w=width, h=height) + Markup('aria-label="{}">{}</svg>').format(label, Markup("").join(parts))
    return Drawing(piece.title, svg, wide=width > 2 * (_BOX_WIDTH + _GAP_X) + 2 * _MARGIN)


def _place_all(piece: Piece, network: Network) -> tuple[dict[int, _Place], float, float]:
    """Return the place of every node, and the width and height of the drawing."""
    layer_widths = [sum(map(_width, layer)) + _GAP_X * (len(layer) - 1) for layer in piece.layers]
    width = max(*layer_widths, _BOX_WIDTH) + 2 * _MARGIN
    places = {}
    y = 1.0
    for layer, layer_width in zip(piece.layers, layer_widths, strict=True):
        layer_height = max((_height(network.boxes[node]) for node in layer if node >= 0), default=0)
        x = (width - layer_width) / 2
        for node in layer:
            height = _height(network.boxes[node]) if node >= 0 else layer_height
            top = y + (layer_height - height) / 2
            places[node] = _Place(x + _width(node) / 2, top, top + height, _width(node))
            x += _width(node) + _GAP_X
        y += layer_height + _GAP_Y
    return places, width, y - _GAP_Y + 1


def _width(node: int) -> float:
    return _BOX_WIDTH if node >= 0 else 0 if node == START else _BEND_WIDTH


def _height(box: Box) -> float:
    return _SITE_HEIGHT if box.sites else _OPERATION_HEIGHT


def _edge(places: list[_Place]) -> Markup:
    """Return the path of an edge over its bends, with an arrow head at its end."""
    path = f"M{places[0].x:.0f} {places[0].bottom:.0f}"
    for tail, head in pairwise(places):
        if abs(tail.x - head.x) < _STRAIGHT:
            path += f"V{head.top:.0f}"
        else:
            middle = (tail.bottom + head.top) / 2
            path += f"C{tail.x:.0f} {middle:.0f} {head.x:.0f} {middle:.0f} {head.x:.0f} {head.top:.0f}"
        if head is not places[-1]:
            path += f"V{head.bottom:.0f}"
    return _arrow(path, places[-1].x, places[-1].top)


def _arrow(path: str, x: float, y: float) -> Markup:
    return Markup('<path class="edge" d="{}"/><path class="head" d="M{x:.0f} {y:.0f}l-3 -6h6z"/>').format(
        path, x=x, y=y
    )


def _box(box: Box, place: _Place, title: str, rewritten: Mapping[str, str], numbers: Mapping[str, int]) -> Markup:
    """Return a box; one with sites is a link to them in the table."""
    count = sum(name in rewritten for name in box.sites)
    state = "op" if not box.sites else "done" if count == len(box.sites) else "part" if count else "kept"
    full_text, *lines = _texts(box, title, rewritten, count)
    shape = Markup('<title>{}</title><rect x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{:.0f}" rx="5"/>').format(
        full_text, place.x - place.width / 2, place.top, place.width, place.bottom - place.top
    )
    text = Markup("").join(
        Markup('<text{} x="{:.0f}" y="{:.0f}">{}</text>').format(
            Markup(' class="small"') if index else "", place.x, place.top + 15 + 14 * index, fold(line, _MAX_LETTERS)
        )
        for index, line in enumerate(lines)
    )
    group = Markup('<g class="{}">{}{}</g>').format(state, shape, text)
    if not box.sites:
        return group
    in_table = [numbers[name] for name in box.sites if name in numbers]
    if len(box.sites) == 1 and in_table:
        link = Markup('<a href="#site-{n}" data-site="{n}" aria-label="{}">{}</a>')
        return link.format(full_text, group, n=in_table[0])
    prefix = ".".join(box.path) + "."
    return Markup('<a href="#sites" data-filter="{}" aria-label="{}">{}</a>').format(prefix, full_text, group)


def _texts(box: Box, title: str, rewritten: Mapping[str, str], count: int) -> list[str]:
    """Return the full text of a box, and the one or two lines that are drawn."""
    if not box.sites:
        steps = " · ".join(box.steps)
        return [steps, steps]
    if len(box.sites) == 1 and not box.collapsed:
        (name,) = box.sites
        decision = rewritten.get(name, "kept")
        steps = f"; then {' · '.join(box.steps[1:])}" if box.steps[1:] else ""
        local_name = name.removeprefix(f"{title}.") if title else name
        return [f"{name or '(root)'}: {decision}{steps}", local_name or "(root)", decision]
    path = ".".join(box.path)
    decision = f"{count} of {len(box.sites)} rewritten"
    return [f"{path}: {decision}", path, decision]

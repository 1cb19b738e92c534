"""The network's graph as SVG, one drawing for each piece of it; colours are the page's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from tdfx.plans.plan import Plan
from tdfx.plans.table import fold
from tdfx.report.layout import START, Piece, pieces_of
from tdfx.report.network import Box, Network

_WIDTH, _GAP_X, _GAP_Y, _MARGIN = 142, 10, 16, 8
_TALL, _LOW = 36, 22
_BEND = 14
_LETTERS = 20
"""Letters that a box has room for."""
_SLIVER = 0.5


@dataclass(frozen=True, slots=True)
class Drawing:
    """One piece, drawn."""

    title: str
    svg: Markup
    wide: bool
    """True if it does not fit a column of the page."""


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a box, a bend or the start lies."""

    x: float
    top: float
    bottom: float
    width: float


def drawings_of(network: Network, plan: Plan) -> list[Drawing]:
    """Return the drawings of a network, with what the plan does to it."""
    rewritten = {one.name: f"{one.scheme} {'/'.join(map(str, one.ranks or ()))}" for one in plan.factorized}
    pieces = pieces_of(network)
    names = {site.name: number for number, site in enumerate(plan)}
    return [
        _draw(piece, network, rewritten, names, first=number == 0, last=number == len(pieces) - 1)
        for number, piece in enumerate(pieces)
    ]


def _draw(
    piece: Piece,
    network: Network,
    rewritten: Mapping[str, str],
    names: Mapping[str, int],
    *,
    first: bool,
    last: bool,
) -> Drawing:
    spots, width, height = _place(piece, network)
    leaves = not last and network.ordered
    height += _GAP_Y if leaves else 0
    parts = [_edge([spots[node] for node in way]) for way in piece.edges]
    if leaves:
        end = piece.layers[-1][0]
        parts.append(_line(spots[end].x, spots[end].bottom, height - 1))
    parts += [
        _box(network.boxes[node], spots[node], piece.title, rewritten, names)
        for layer in piece.layers
        for node in layer
        if node >= 0
    ]
    label = f"{piece.title or 'outermost'}: {len([one for one in spots if one >= 0])} boxes"
    svg = Markup(
        '<svg class="net" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}" role="group" '
    ).format(w=width, h=height) + Markup('aria-label="{}">{}</svg>').format(label, Markup("").join(parts))
    return Drawing(piece.title, svg, wide=width > 2 * (_WIDTH + _GAP_X) + 2 * _MARGIN)


def _place(piece: Piece, network: Network) -> tuple[dict[int, _Spot], float, float]:
    """Return where everything lies, and the width and height of all."""
    widths = [sum(_width(node) for node in layer) + _GAP_X * (len(layer) - 1) for layer in piece.layers]
    whole = max(*widths, _WIDTH) + 2 * _MARGIN
    spots = {}
    y = 1.0
    for layer, width in zip(piece.layers, widths, strict=True):
        heights = [_height(network.boxes[node]) for node in layer if node >= 0]
        tall = max(heights, default=0)
        x = (whole - width) / 2
        for node in layer:
            own = _width(node)
            high = _height(network.boxes[node]) if node >= 0 else tall
            above = (tall - high) / 2
            spots[node] = _Spot(x + own / 2, y + above, y + above + high, own)
            x += own + _GAP_X
        y += tall + _GAP_Y
    return spots, whole, y - _GAP_Y + 1


def _width(node: int) -> float:
    return _WIDTH if node >= 0 else 0 if node == START else _BEND


def _height(box: Box) -> float:
    return _TALL if box.sites else _LOW


def _edge(spots: list[_Spot]) -> Markup:
    """Return the path of an edge over its bends, with an arrow head at its end."""
    path = f"M{spots[0].x:.0f} {spots[0].bottom:.0f}"
    for one, other in pairwise(spots):
        if abs(one.x - other.x) < _SLIVER:
            path += f"V{other.top:.0f}"
        else:
            middle = (one.bottom + other.top) / 2
            path += f"C{one.x:.0f} {middle:.0f} {other.x:.0f} {middle:.0f} {other.x:.0f} {other.top:.0f}"
        if other is not spots[-1]:
            path += f"V{other.bottom:.0f}"
    return _arrow(path, spots[-1].x, spots[-1].top)


def _line(x: float, top: float, bottom: float) -> Markup:
    return _arrow(f"M{x:.0f} {top:.0f}V{bottom:.0f}", x, bottom)


def _arrow(path: str, x: float, y: float) -> Markup:
    return Markup('<path class="edge" d="{}"/><path class="head" d="M{x:.0f} {y:.0f}l-3 -6h6z"/>').format(
        path, x=x, y=y
    )


def _box(box: Box, spot: _Spot, title: str, rewritten: Mapping[str, str], names: Mapping[str, int]) -> Markup:
    done = [name for name in box.sites if name in rewritten]
    state = "op" if not box.sites else "done" if len(done) == len(box.sites) else "part" if done else "kept"
    full, first, second = _words(box, title, rewritten, len(done))
    x, high = spot.x - spot.width / 2, spot.bottom - spot.top
    shape = Markup('<title>{}</title><rect x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{:.0f}" rx="5"/>').format(
        full, x, spot.top, spot.width, high
    )
    lines = [first, second] if box.sites else [first]
    text = Markup("").join(
        Markup('<text{} x="{:.0f}" y="{:.0f}">{}</text>').format(
            Markup(' class="small"') if index else "", spot.x, spot.top + 15 + 14 * index, fold(line, _LETTERS)
        )
        for index, line in enumerate(lines)
    )
    inside = Markup('<g class="{}">{}{}</g>').format(state, shape, text)
    if not box.sites:
        return inside
    known = [names[one] for one in box.sites if one in names]
    if len(box.sites) == 1 and known:
        return Markup('<a href="#site-{n}" data-site="{n}" aria-label="{}">{}</a>').format(full, inside, n=known[0])
    inner = ".".join(box.path) + "."
    return Markup('<a href="#sites" data-filter="{}" aria-label="{}">{}</a>').format(inner, full, inside)


def _words(box: Box, title: str, rewritten: Mapping[str, str], done: int) -> tuple[str, str, str]:
    """Return what a box says in full, and its two lines."""
    steps = " · ".join(box.steps)
    if not box.sites:
        return steps, steps, ""
    if len(box.sites) == 1 and not box.collapsed:
        (name,) = box.sites
        what = rewritten.get(name, "kept")
        after = " · ".join(box.steps[1:])
        return f"{name or '(root)'}: {what}" + (f"; then {after}" if after else ""), _within(name, title), what
    inner = ".".join(box.path)
    what = f"{done} of {len(box.sites)} rewritten"
    return f"{inner}: {what}", inner, what


def _within(name: str, title: str) -> str:
    return (name.removeprefix(f"{title}.") if title else name) or "(root)"

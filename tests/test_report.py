"""Reports: spectra, the drawing of the graph, the text of the page, and pictures. test_page opens a page in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from checkout import needs, tool
from click.testing import CliRunner
from torch import Tensor, nn

import tdfx
import tdfx.report
from tdfx.cli import main
from tdfx.errors import InputError, ModelError, PlanError, ReportError, WeightError
from tdfx.report.network import MOST_BOXES, Box, Network
from tdfx.report.network_layout import START, pieces_of
from tdfx.report.network_svg import drawings_of
from tdfx.report.picture import write_plot
from tdfx.report.webpage import render_page

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=tdfx.Modelled(), min_gain=0)


class Block(nn.Module):
    """Two convolutions with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, groups=1)
        self.blocks = nn.Sequential(*(Block(32) for _ in range(blocks)))
        self.deep = nn.Conv2d(32, 32, 3, groups=32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.blocks(self.stem(x)))
        batch = x.size(0)
        out: Tensor = self.head(x.mean((2, 3)).view(batch, -1))
        return out


class Branches(nn.Module):
    """A model that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) if x.sum() > 0 else x
        return out


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def plan(net: Net) -> tdfx.Plan:
    return tdfx.plan(net, QUARTER, example_inputs=torch.randn(2, 3, 12, 12))


def look(model: nn.Module, policy: tdfx.Policy = QUARTER) -> tdfx.report.ModelView:
    return tdfx.report.look(model, tdfx.plan(model, policy))


# Spectra


def test_curves_are_the_singular_values_of_the_unfoldings(net: Net, plan: tdfx.Plan) -> None:
    out, into = tdfx.report.look(net, plan).spectra["blocks.0.conv1"]
    weight = net.blocks[0].get_parameter("conv1.weight").detach().double()
    for curve, axis, rank in zip((out, into), (0, 1), plan["blocks.0.conv1"].ranks or (), strict=True):
        expected = torch.linalg.svdvals(weight.movedim(axis, 0).flatten(1))
        relative = expected / expected[0]
        # The values are roots of those of the Gram matrix, so they are exact to the root of rounding.
        torch.testing.assert_close(torch.tensor(curve.values, dtype=torch.float64), relative, rtol=0, atol=1e-7)
        assert curve.rank == rank
        energy = float(expected[:rank].square().sum() / expected.square().sum())
        assert curve.energy == pytest.approx(energy, rel=1e-12)
    assert (out.mode, into.mode) == ("output channels", "input channels")


def test_a_kept_site_has_a_curve_without_a_rank_and_a_site_without_a_scheme_has_none(net: Net) -> None:
    plan = tdfx.plan(net, tdfx.Policy(rank=tdfx.Ratio(of=0.25), exclude=("head",), min_gain=0))
    spectra = tdfx.report.look(net, plan).spectra
    (curve,) = spectra["head"]
    assert (curve.rank, curve.energy, len(curve.values)) == (None, None, 10)
    assert "deep" not in spectra
    assert set(spectra) == {site.name for site in plan} - {"deep"}


def test_a_factorized_model_shows_the_spectra_of_its_factors(net: Net) -> None:
    small = tdfx.rewrite(net, QUARTER)
    plan = tdfx.plan(small, QUARTER)
    curves = tdfx.report.look(small, plan).spectra["blocks.0.conv1"]
    assert plan["blocks.0.conv1"].reason is tdfx.Reason.FACTORIZED
    assert [curve.rank for curve in curves] == [8, 8]
    assert all(curve.energy == pytest.approx(1, abs=1e-12) for curve in curves)


def test_a_weight_of_zeros_and_the_meta_device_have_reports(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    (curve,) = look(model).spectra["0"]
    assert set(curve.values) == {0.0}
    assert curve.energy == 0
    tdfx.report.plot(model, tdfx.plan(model, QUARTER), tmp_path / "zero.png")
    with torch.device("meta"):
        empty = Net()
    view = look(empty)
    assert view.spectra == {}
    assert "No scheme fits" in render_page(view)
    write_plot(view, tmp_path / "meta.png")


def test_a_view_leaves_the_model_as_it_was(net: Net, plan: tdfx.Plan) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    versions = [parameter._version for parameter in net.parameters()]
    tdfx.report.look(net, plan, example_inputs=torch.randn(2, 3, 12, 12))
    assert versions == [parameter._version for parameter in net.parameters()]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_plan_of_another_model_is_refused(net: Net, plan: tdfx.Plan) -> None:
    with pytest.raises(PlanError, match="factorizes 'stem', and the model has no such site"):
        tdfx.report.look(nn.Sequential(nn.Linear(3, 3)), plan)
    other = Net()
    other.head = nn.Linear(32, 11)
    with pytest.raises(PlanError, match=r"'head' has shape \(11, 32\), and \(10, 32\) in the plan"):
        tdfx.report.look(other, plan)
    with pytest.raises(InputError, match="does not accept the example inputs"):
        tdfx.report.look(net, plan, example_inputs=torch.randn(2, 5, 12, 12))
    with pytest.raises(ModelError, match="int"):
        tdfx.report.look(3, plan)  # type: ignore[arg-type]
    with torch.no_grad():
        net.head.weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match="'head' has 1 values that are NaN"):
        tdfx.report.look(net, plan)


# The graph


def edges_by_name(network: Network) -> set[tuple[str, str]]:
    def name(box: Box) -> str:
        return box.sites[0] if box.sites else " ".join(box.steps)

    return {(name(network.boxes[a]), name(network.boxes[b])) for a, b in network.edges}


def test_the_graph_has_sites_and_the_edges_between_them(net: Net) -> None:
    network = look(net).network
    assert edges_by_name(network) == {
        ("input x", "stem"),
        ("stem", "blocks.0.conv1"),
        ("stem", "+ relu"),
        ("blocks.0.conv1", "blocks.0.conv2"),
        ("blocks.0.conv2", "+ relu"),
        ("+ relu", "blocks.1.conv1"),
        ("+ relu", "+ relu"),
        ("blocks.1.conv1", "blocks.1.conv2"),
        ("blocks.1.conv2", "+ relu"),
        ("+ relu", "deep"),
        ("deep", "head"),
        ("head", "output"),
    }
    # Operations after a single site are in its box; operations that only read shapes are left out.
    steps = {box.sites[0]: box.steps for box in network.boxes.values() if box.sites}
    assert steps["blocks.0.conv1"] == ("conv1", "bn1", "relu")
    assert steps["deep"] == ("deep", "mean", "view")


def test_a_piece_ends_where_everything_after_it_depends_on_one_box(net: Net) -> None:
    network = look(net).network
    pieces = pieces_of(network)
    assert [piece.title for piece in pieces] == ["", "blocks.0", "blocks.1", ""]
    drawn = [node for piece in pieces for layer in piece.layers for node in layer if node >= 0]
    assert sorted(drawn) == sorted(network.boxes)
    # Every edge is drawn once: inside its piece, or from the start of a piece.
    ends = [(way[0], way[-1]) for piece in pieces for way in piece.edges]
    inside = {(a, b) for a, b in ends if a != START}
    assert inside <= set(network.edges)
    left = set(network.edges) - inside
    assert sorted(b for a, b in ends if a == START) == sorted(b for _, b in left)
    assert len({a for a, _ in left}) == len(pieces) - 1
    # A shortcut bends at each layer that it passes, and no edge goes up.
    (block,) = [piece for piece in pieces if piece.title == "blocks.0"]
    place = {node: number for number, layer in enumerate(block.layers) for node in layer}
    assert all([place[node] for node in way] == list(range(place[way[0]], place[way[-1]] + 1)) for way in block.edges)
    assert max(map(len, block.edges)) == 4


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "swin_t"])
def test_the_graph_of_a_large_model_stays_readable(name: str) -> None:
    with torch.device("meta"):
        options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    view = look(model)
    assert view.network.ordered
    assert 10 < len(view.network.boxes) <= MOST_BOXES
    assert len(view.network.edges) <= 3 * len(view.network.boxes)
    shown = [site for box in view.network.boxes.values() for site in box.sites]
    assert sorted(shown) == sorted(site.name for site in view.plan if site.calls)
    assert all(a < b for a, b in view.network.edges)
    widest = max(
        float(re.findall(r'width="(\d+)"', drawing.svg)[0]) for drawing in drawings_of(view.network, view.plan)
    )
    assert widest <= 800  # GoogLeNet: four branches and an auxiliary head side by side


def test_a_model_that_cannot_be_traced_shows_its_sites_and_says_so() -> None:
    view = look(Branches())
    assert not view.network.ordered
    assert [piece.title for piece in pieces_of(view.network)] == ["inner"]
    assert "torch.fx cannot trace the model" in render_page(view)
    assert "torch.fx cannot trace the model" not in render_page(look(Net()))


# The page


class Page(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._in, []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_loads_nothing_and_runs_only_its_own_script(net: Net, plan: tdfx.Plan) -> None:
    page = Page(render_page(tdfx.report.look(net, plan)))
    (policy,) = [tag["content"] or "" for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules) == {"default-src", "base-uri", "form-action", "style-src", "script-src"}
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(page.texts[tag][-1].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    outside = {"src", "srcset", "action", "style", "onclick", "onload", "xlink:href"}
    assert [attrs for _, attrs in page.tags if outside & set(attrs)] == []
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert page.all("link") == page.all("img") == page.all("iframe") == []


def test_names_may_hold_html(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>&'\""
    model = nn.Module()
    model.add_module(evil.replace(".", ""), nn.Linear(32, 32))
    plan = tdfx.plan(model, QUARTER)
    plan = replace(plan, model=evil, policy=evil, notes=(evil,), sites=(replace(plan.sites[0], note=evil),))
    text = render_page(tdfx.report.look(model, plan))
    page = Page(text)
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert evil in page.texts["h1"]
    assert text.count("<img") == 0
    json.loads(page.texts["script"][0])


def test_the_table_is_the_plan(net: Net, plan: tdfx.Plan) -> None:
    page = Page(render_page(tdfx.report.look(net, plan)))
    sites = [button for button in page.all("button") if button.get("class") == "site"]
    assert [int(button["data-site"] or "") for button in sites] == list(range(len(plan)))
    heads = [head for head in page.all("th") if head.get("scope") == "col"]
    assert len(heads) == 10
    assert {head["aria-sort"] for head in heads} == {"none"}
    keys = [cell["data-key"] for cell in page.all("td") if cell["data-title"] == "parameters"]
    assert [float(key or "") for key in keys] == [site.parameters_before for site in plan]
    curves = json.loads(page.texts["script"][0])
    assert [len(each) for each in curves] == [2, 2, 2, 2, 2, 0, 1]
    assert [curve["rank"] for curve in curves[1]] == list(plan["blocks.0.conv1"].ranks or ())
    assert all(len(curve["at"]) == len(curve["values"]) for site in curves for curve in site)


def test_every_box_of_the_graph_shows_the_decision_of_the_plan(net: Net) -> None:
    plan = tdfx.plan(net, tdfx.Policy(rank=tdfx.Ratio(of=0.25), exclude=("head",), min_gain=0))
    text = render_page(tdfx.report.look(net, plan))
    assert text.count('<g class="done">') == len(plan.factorized) == 5
    assert text.count('<g class="kept">') == len(plan.kept) == 2


def test_a_page_for_156_sites_is_under_a_megabyte() -> None:
    # The sizes of ResNet-152's spectra, on layers that are quick to decompose.
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(96, 96, 3), nn.Linear(96, 128)) for _ in range(78)))
    view = look(blocks)
    assert len(view.plan) == 156
    assert len(render_page(view).encode()) < 1_000_000


def test_reports_appear_complete_or_not_at_all(net: Net, plan: tdfx.Plan, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("before")
    target.chmod(0o640)
    tdfx.report.page(net, plan, target)
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(ReportError, match=r"could not be written: .* Name a file in a folder that exists"):
        tdfx.report.page(net, plan, tmp_path / "nowhere" / "report.html")


# Pictures


@pytest.mark.parametrize("sites", [1, 5, 20])
def test_a_picture_has_a_panel_for_every_site(sites: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(sites)))
    view = look(model)
    write_plot(view, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    # matplotlib writes each text into a comment too.
    assert all(f"<!-- {number} · {number - 1} -->" in text for number in range(1, sites + 1))
    assert f"<!-- {sites + 1} · {sites} -->" not in text
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    assert width <= 17 * 72
    assert height <= (4 + 1.45 * (sites / 3 + 1)) * 72
    write_plot(view, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_a_pdf_has_pages_and_a_png_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("tdfx.report.picture.ROWS_PER_PAGE", 1)
    view = look(nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))))
    write_plot(view, tmp_path / "picture.pdf")
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "picture.pdf").read_bytes())) == 2
    write_plot(view, tmp_path / "picture.png")
    head = (tmp_path / "picture.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert int.from_bytes(head[16:20]) <= 8 * 2.1 * 130 + 1


def test_a_name_with_dollars_is_not_mathematics_and_the_settings_of_the_user_stay(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.rcParams["font.size"] = 31.0
    model = nn.Module()
    model.add_module(r"$\frac{", nn.Linear(16, 16))
    tdfx.report.plot(model, tdfx.plan(model, QUARTER), tmp_path / "picture.svg")
    assert "$\\frac{" in (tmp_path / "picture.svg").read_text()
    assert matplotlib.rcParams["font.size"] == 31.0
    matplotlib.rcdefaults()


def test_pictures_that_cannot_be_drawn_are_refused_before_the_work(
    net: Net, plan: tdfx.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ReportError, match=r"'a\.gif' has the suffix '\.gif', and a picture is written as \.png, \.svg, \.pdf"
    ):
        tdfx.report.plot(net, plan, "a.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ReportError, match=r"A picture needs matplotlib, .* pip install 'tdfx\[report\]'"):
        tdfx.report.plot(net, plan, "a.png")
    result = CliRunner().invoke(main, ["inspect", "no_such:model", "--plot", "a.png"])
    assert "A picture needs matplotlib" in result.stderr
    assert result.exit_code == 2


def test_inspect_writes_both(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "nets.py").write_text("from torch import nn\ndef build(): return nn.Sequential(nn.Linear(32, 32))\n")
    files = ["--plot", f"{tmp_path}/a.svg", "--html", f"{tmp_path}/a.html"]
    options = ["--policy", "ratio:0.25", "--min-gain", "0", "--modelled", "--input", "2,32"]
    result = CliRunner().invoke(main, ["inspect", f"{tmp_path}/nets.py:build", *options, *files])
    assert result.exit_code == 0, result.output
    assert "rank" in (tmp_path / "a.svg").read_text()
    assert "Sequential" in (tmp_path / "a.html").read_text()
    refused = CliRunner().invoke(main, ["inspect", "no_such:model", "--html", f"{tmp_path}/nowhere/a.html"])
    assert "Cannot write" in refused.stderr


@needs("picture.py")
def test_the_tool_that_draws_the_picture_of_the_readme_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    result = CliRunner().invoke(tool("picture").main, [f"{tmp_path}/a.png", "--epochs", "0"])
    assert result.exit_code == 0, result.output
    assert "7 sites" in result.output
    assert (tmp_path / "a.png").stat().st_size > 10_000

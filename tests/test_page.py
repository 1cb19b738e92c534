"""The page of a plan in a real browser: it sorts, filters and shows spectra by mouse and keyboard, and loads nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
import tdfx.report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

EVIL = "<b onclick=alert(1)>&"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.layer = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 32, 1))
        self.add_module(EVIL, nn.Linear(32, 40))
        self.deep = nn.Conv2d(32, 32, 3, groups=32)

    def forward(self, x: Tensor) -> Tensor:
        head: nn.Module = self._modules[EVIL]  # type: ignore[assignment]
        out: Tensor = head(self.deep(self.layer(self.stem(x))).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[tdfx.Plan, Path]:
    torch.manual_seed(0)
    model = Net()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=tdfx.Modelled(), exclude=("stem",), min_gain=0)
    plan = tdfx.plan(model, policy, example_inputs=torch.randn(2, 3, 16, 16))
    path = tmp_path_factory.mktemp("page") / "report.html"
    tdfx.report.page(model, plan, path)
    return plan, path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class OpenPage:
    """A page in the browser, with its messages and requests."""

    def __init__(self, browser: Any, path: Path, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def names(self) -> list[str]:
        """Return the visible sites, in their order."""
        names: list[str] = self.page.locator("tbody tr:visible .site").all_inner_texts()
        return names

    def head(self, title: str) -> Any:
        return self.page.get_by_role("columnheader").get_by_role("button", name=title, exact=True)

    def sorting(self, title: str) -> str:
        order: str = self.head(title).locator("..").get_attribute("aria-sort")
        return order


@pytest.fixture
def opened(browser: Any, report: tuple[tdfx.Plan, Path]) -> Iterator[OpenPage]:
    opened = OpenPage(browser, report[1])
    yield opened
    assert opened.messages == []
    assert opened.requests == [report[1].as_uri()]
    opened.context.close()


def test_columns_sort_by_number_and_empty_cells_come_last(opened: OpenPage, report: tuple[tdfx.Plan, Path]) -> None:
    plan, _ = report
    assert opened.names() == [site.name for site in plan]
    by_size = [site.name for site in sorted(plan, key=lambda site: site.parameters_before)]
    assert by_size != sorted(by_size, key=lambda name: str(plan[name].parameters_before))  # the order as text differs
    opened.head("parameters").click()
    assert opened.names() == by_size
    assert opened.sorting("parameters") == "ascending"
    opened.head("parameters").click()
    assert opened.names() == by_size[::-1]
    assert opened.sorting("parameters") == "descending"
    opened.head("error").click()
    assert (opened.sorting("error"), opened.sorting("parameters")) == ("ascending", "none")
    errors = [plan[name].error for name in opened.names()]
    numbers = sorted(error for error in errors if error is not None)
    assert errors == [*numbers, None, None]
    opened.head("error").click()
    assert [plan[name].error for name in opened.names()] == [*numbers[::-1], None, None]
    opened.head("site").click()
    assert opened.names() == [EVIL, "deep", "layer.0", "layer.1", "layer.3", "stem"]


def test_the_filter_narrows_by_every_word(opened: OpenPage) -> None:
    opened.page.get_by_label("Filter").fill("LAYER. tucker2")
    assert opened.names() == ["layer.0", "layer.1"]
    assert opened.page.get_by_role("status").inner_text() == "2 of 6 sites"
    opened.head("parameters").click()
    opened.head("parameters").click()
    assert opened.names() == ["layer.1", "layer.0"]
    opened.page.get_by_label("Filter").fill("no such site")
    assert opened.names() == []
    assert opened.page.get_by_text("No site matches.").is_visible()
    opened.page.get_by_label("Filter").fill("")
    assert len(opened.names()) == 6


def test_a_click_shows_the_spectrum_with_its_rank(opened: OpenPage, report: tuple[tdfx.Plan, Path]) -> None:
    plan, _ = report
    dialog = opened.page.get_by_role("dialog")
    assert not dialog.is_visible()
    opened.page.get_by_role("button", name="layer.1", exact=True).click()
    assert dialog.get_by_role("heading").inner_text() == "layer.1"
    charts = dialog.get_by_role("img")
    assert charts.count() == 2
    assert plan["layer.1"].ranks == (24, 16)
    assert [text.rpartition("rank ")[2] for text in dialog.locator(".mark").all_text_contents()] == ["24", "16"]
    assert "rank 24 of 96 keeps" in (charts.first.get_attribute("aria-label") or "")
    # The line falls from left to right, and the rank is at a quarter of its width.
    points = json.loads(opened.page.evaluate(_POINTS))
    assert len(points) == 96
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(points))
    cut = float(dialog.locator(".rank").first.get_attribute("x1") or 0)
    first, last = points[0][0], points[-1][0]
    assert (cut - first) / (last - first) == pytest.approx(23.5 / 95, abs=0.002)
    dialog.get_by_label("Close").click()
    assert not dialog.is_visible()


_POINTS = """JSON.stringify(document.querySelector("#curves .line").getAttribute("d").slice(1).split("L")
    .map((point) => point.split(" ").map(Number)))"""


def test_a_kept_site_shows_a_spectrum_or_says_why_not(opened: OpenPage) -> None:
    dialog = opened.page.get_by_role("dialog")
    opened.page.get_by_role("button", name="stem", exact=True).click()
    assert dialog.locator(".line").count() == 2
    assert dialog.locator(".rank").count() == 0
    assert "excluded" in dialog.inner_text()
    opened.page.keyboard.press("Escape")
    opened.page.get_by_role("button", name="deep", exact=True).click()
    assert "there is no spectrum" in dialog.inner_text()


def test_everything_works_by_keyboard(opened: OpenPage) -> None:
    keyboard, dialog = opened.page.keyboard, opened.page.get_by_role("dialog")
    keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.textContent") == "Skip to the sites"
    keyboard.press("Enter")
    keyboard.press("Tab")
    keyboard.type("layer")
    assert len(opened.names()) == 3
    for _ in range(2):
        keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.textContent") == "layer"
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    keyboard.press("Space")
    assert opened.sorting("site") == "descending"
    opened.page.get_by_role("button", name="layer.1", exact=True).focus()
    keyboard.press("Enter")
    assert dialog.get_by_role("heading").inner_text() == "layer.1"
    keyboard.press("ArrowRight")  # in the order of the table
    assert dialog.get_by_role("heading").inner_text() == "layer.0"
    assert dialog.get_by_label("Next site").is_disabled()
    keyboard.press("ArrowLeft")
    keyboard.press("ArrowLeft")
    assert dialog.get_by_role("heading").inner_text() == "layer.3"
    keyboard.press("Escape")
    assert not dialog.is_visible()
    assert opened.page.evaluate("document.activeElement.textContent") == "layer.1"


def test_the_graph_links_to_spectra(opened: OpenPage) -> None:
    site = opened.page.locator(".network a[data-site]").filter(has_text="tucker2").last
    site.focus()
    opened.page.keyboard.press("Enter")
    assert opened.page.get_by_role("dialog").get_by_role("heading").inner_text() == "layer.1"
    assert opened.page.locator(".network .done").count() == 4
    assert opened.page.locator(".network .kept").count() == 2


def test_names_with_html_are_text(opened: OpenPage) -> None:
    assert EVIL in opened.names()
    assert opened.page.locator("b").count() == 0
    opened.page.get_by_role("button", name=EVIL, exact=True).click()
    assert opened.page.get_by_role("dialog").get_by_role("heading").inner_text() == EVIL
    assert opened.page.locator("b").count() == 0


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, report: tuple[tdfx.Plan, Path], width: int) -> None:
    opened = OpenPage(browser, report[1], width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.get_by_role("button", name="layer.1", exact=True).click()
    box = opened.page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    if width < 768:
        assert opened.page.locator("tbody tr").first.bounding_box()["width"] <= width
        # Each cell of a row shows its title, and the buttons still sort.
        assert (
            opened.page.locator("td[data-title=ranks]")
            .nth(1)
            .evaluate("(e) => getComputedStyle(e, '::before').content")
        )
        opened.page.keyboard.press("Escape")
        opened.head("parameters").click()
        assert opened.sorting("parameters") == "ascending"
    opened.context.close()


def test_the_policy_of_the_page_holds(browser: Any, report: tuple[tdfx.Plan, Path]) -> None:
    """The browser refuses to load anything, even if a script asks for it; the other tests rely on this."""
    opened = OpenPage(browser, report[1])
    opened.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    opened.page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert any("Content Security Policy" in message for message in opened.messages)
    opened.context.close()

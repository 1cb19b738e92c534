"""The page of a plan in a real browser: it sorts, filters and shows spectra, by mouse and by keyboard, and asks nobody."""

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
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[tdfx.Plan, Path]:
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
        one = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield one
        one.close()


class Seen:
    """A page in the browser, and all that it said or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def names(self) -> list[str]:
        """Return the sites that are shown, in their order."""
        found: list[str] = self.page.locator("tbody tr:visible .site").all_inner_texts()
        return found

    def head(self, title: str) -> Any:
        return self.page.get_by_role("columnheader").get_by_role("button", name=title, exact=True)

    def sorting(self, title: str) -> str:
        found: str = self.head(title).locator("..").get_attribute("aria-sort")
        return found


@pytest.fixture
def seen(browser: Any, made: tuple[tdfx.Plan, Path]) -> Iterator[Seen]:
    one = Seen(browser, made[1])
    yield one
    assert one.said == []
    assert one.asked == [made[1].as_uri()]
    one.context.close()


def test_columns_sort_by_number_and_what_has_none_comes_last(seen: Seen, made: tuple[tdfx.Plan, Path]) -> None:
    plan, _ = made
    assert seen.names() == [one.name for one in plan]
    by_size = [one.name for one in sorted(plan, key=lambda one: one.parameters_before)]
    assert by_size != sorted(by_size, key=lambda name: str(plan[name].parameters_before))  # as text it is another order
    seen.head("parameters").click()
    assert seen.names() == by_size
    assert seen.sorting("parameters") == "ascending"
    seen.head("parameters").click()
    assert seen.names() == by_size[::-1]
    assert seen.sorting("parameters") == "descending"
    seen.head("error").click()
    assert (seen.sorting("error"), seen.sorting("parameters")) == ("ascending", "none")
    errors = [plan[name].error for name in seen.names()]
    known = sorted(one for one in errors if one is not None)
    assert errors == [*known, None, None]
    seen.head("error").click()
    assert [plan[name].error for name in seen.names()] == [*known[::-1], None, None]
    seen.head("site").click()
    assert seen.names() == [EVIL, "deep", "layer.0", "layer.1", "layer.3", "stem"]


def test_the_filter_narrows_by_every_word(seen: Seen) -> None:
    seen.page.get_by_label("Filter").fill("LAYER. tucker2")
    assert seen.names() == ["layer.0", "layer.1"]
    assert seen.page.get_by_role("status").inner_text() == "2 of 6 sites"
    seen.head("parameters").click()
    seen.head("parameters").click()
    assert seen.names() == ["layer.1", "layer.0"]
    seen.page.get_by_label("Filter").fill("no such site")
    assert seen.names() == []
    assert seen.page.get_by_text("No site matches.").is_visible()
    seen.page.get_by_label("Filter").fill("")
    assert len(seen.names()) == 6


def test_a_click_shows_the_spectrum_with_its_rank(seen: Seen, made: tuple[tdfx.Plan, Path]) -> None:
    plan, _ = made
    dialog = seen.page.get_by_role("dialog")
    assert not dialog.is_visible()
    seen.page.get_by_role("button", name="layer.1", exact=True).click()
    assert dialog.get_by_role("heading").inner_text() == "layer.1"
    charts = dialog.get_by_role("img")
    assert charts.count() == 2
    assert plan["layer.1"].ranks == (24, 16)
    assert [one.rpartition("rank ")[2] for one in dialog.locator(".mark").all_text_contents()] == ["24", "16"]
    assert "rank 24 of 96 keeps" in (charts.first.get_attribute("aria-label") or "")
    # The line falls from left to right, and the rank stands a quarter of the way.
    points = json.loads(seen.page.evaluate(_POINTS))
    assert len(points) == 96
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(points))
    cut = float(dialog.locator(".rank").first.get_attribute("x1") or 0)
    first, last = points[0][0], points[-1][0]
    assert (cut - first) / (last - first) == pytest.approx(23.5 / 95, abs=0.002)
    dialog.get_by_label("Close").click()
    assert not dialog.is_visible()


_POINTS = """JSON.stringify(document.querySelector("#curves .line").getAttribute("d").slice(1).split("L")
    .map((point) => point.split(" ").map(Number)))"""


def test_a_site_that_is_kept_shows_a_spectrum_or_says_why_not(seen: Seen) -> None:
    dialog = seen.page.get_by_role("dialog")
    seen.page.get_by_role("button", name="stem", exact=True).click()
    assert dialog.locator(".line").count() == 2
    assert dialog.locator(".rank").count() == 0
    assert "excluded" in dialog.inner_text()
    seen.page.keyboard.press("Escape")
    seen.page.get_by_role("button", name="deep", exact=True).click()
    assert "there is no spectrum" in dialog.inner_text()


def test_all_can_be_done_by_keyboard(seen: Seen) -> None:
    keyboard, dialog = seen.page.keyboard, seen.page.get_by_role("dialog")
    keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.textContent") == "Skip to the sites"
    keyboard.press("Enter")
    keyboard.press("Tab")
    keyboard.type("layer")
    assert len(seen.names()) == 3
    for _ in range(2):
        keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.textContent") == "layer"
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    keyboard.press("Space")
    assert seen.sorting("site") == "descending"
    seen.page.get_by_role("button", name="layer.1", exact=True).focus()
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
    assert seen.page.evaluate("document.activeElement.textContent") == "layer.1"


def test_the_graph_leads_to_spectra(seen: Seen) -> None:
    site = seen.page.locator(".network a[data-site]").filter(has_text="tucker2").last
    site.focus()
    seen.page.keyboard.press("Enter")
    assert seen.page.get_by_role("dialog").get_by_role("heading").inner_text() == "layer.1"
    assert seen.page.locator(".network .done").count() == 4
    assert seen.page.locator(".network .kept").count() == 2


def test_names_with_html_are_text(seen: Seen) -> None:
    assert EVIL in seen.names()
    assert seen.page.locator("b").count() == 0
    seen.page.get_by_role("button", name=EVIL, exact=True).click()
    assert seen.page.get_by_role("dialog").get_by_role("heading").inner_text() == EVIL
    assert seen.page.locator("b").count() == 0


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, made: tuple[tdfx.Plan, Path], width: int) -> None:
    seen = Seen(browser, made[1], width)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    seen.page.get_by_role("button", name="layer.1", exact=True).click()
    box = seen.page.get_by_role("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    if width < 768:
        assert seen.page.locator("tbody tr").first.bounding_box()["width"] <= width
        # What a row says is still said under its title, and the buttons still sort.
        assert (
            seen.page.locator("td[data-title=ranks]").nth(1).evaluate("(e) => getComputedStyle(e, '::before').content")
        )
        seen.page.keyboard.press("Escape")
        seen.head("parameters").click()
        assert seen.sorting("parameters") == "ascending"
    seen.context.close()


def test_the_policy_of_the_page_holds(browser: Any, made: tuple[tdfx.Plan, Path]) -> None:
    """What the page would not do is refused by the browser too: this is what the other tests rely on."""
    seen = Seen(browser, made[1])
    seen.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    seen.page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert any("Content Security Policy" in one for one in seen.said)
    seen.context.close()

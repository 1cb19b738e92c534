"""The figures of the READMEs are those that the benchmarks wrote."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from checkout import needs
from readmes import FRONT, ROOT, TOOLS, output_of, read, section

pytestmark = needs("train.py")


def results_of(file: str) -> list[dict[str, Any]]:
    """Return what a benchmark wrote."""
    results: list[dict[str, Any]] = json.loads((ROOT / "tools" / "results" / file).read_text("utf-8"))["results"]
    return results


def columns(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())


def rows_under(table: str, title: str) -> dict[str, list[str]]:
    """Return the rows of one part of a table by their first column; the part begins with the title."""
    start = next(number for number, line in enumerate(table.splitlines()) if line.strip().startswith(title))
    part = " \n".join(table.splitlines()[start + 1 :]).partition(" \n \n")[0]
    return {columns(line)[0]: columns(line)[1:] for line in part.splitlines()}


@pytest.mark.parametrize(
    ("label", "title"),
    [
        ("transformer, text, 15 epochs", "text, transformer, 15 epochs"),
        ("VGG-like, digits, 24 epochs", "digits, VGG-like, 24 epochs"),
        ("ResNet-18-like, digits, 24 epochs", "digits, ResNet-18-like, 24 epochs"),
        ("VGG-like, rendered letters, 6 epochs", "glyphs, VGG-like, 6 epochs"),
        ("ResNet-18-like, rendered letters, 4 epochs", "glyphs, ResNet-18-like, 4 epochs"),
        ("ResNet-56, digits, 24 epochs", "digits, ResNet-56, 24 epochs"),
    ],
)
def test_the_front_pages_trainings_are_those_of_the_papers_table(label: str, title: str) -> None:
    rows = rows_under(output_of(read(TOOLS), "python tools/paper_table.py --readme"), title)
    accuracies = [rows[name][0].split(" ")[0] for name in ("full", "tdfx default")]
    _, _, faster, first_time, *_ = rows["tdfx default"]
    front = read(FRONT)
    assert f"| {label} | {faster}x | {accuracies[0]} → {accuracies[1]} % |" in front
    assert f"{first_time}x" in section(front, "## Results")


def test_the_front_pages_other_figures_are_measured() -> None:
    front, tools = read(FRONT), read(TOOLS)
    demo = output_of(front, "tdfx demo --seed 2")
    full, factorized, _ = re.findall(r"([\d.]+) %", demo)
    (faster,) = re.findall(r"trained ([\d.]+x) faster", demo)
    assert f"| VGG, digits, 24 epochs | {faster} |" in front
    assert f"| {full} → {factorized} % | `tdfx demo --seed 2` |" in front
    taken, whole = re.findall(r"took ([\d.]+) s", demo)[0], columns(demo.splitlines()[1])[2]
    assert f"({taken} of the demo's {whole.removesuffix(' s')})" in front
    rows = rows_under(output_of(tools, "python tools/compare.py --table tools/results/compare.json"), "transformer")
    assert f"{rows['dense'][5]} → {rows['tdfx'][5]} %" in front


def test_the_front_page_and_the_tools_agree_with_the_file_on_never_slower() -> None:
    results = results_of("never_slower.json")
    times = sorted(row["faster"] for row in results)
    least, middle, most = times[0], times[len(times) // 2], times[-1]
    assert f"| steps of {len(times)} torchvision classifiers | {least:.2f}x to {most:.2f}x, median {middle:.2f}x |" in (
        read(FRONT)
    )
    text = " ".join(section(read(TOOLS), "### Never slower").split())
    assert f"All {len(times)} of up to" in text
    assert f"came to {least:.2f}x" in text
    assert f"to {most:.2f}x (" in text
    assert f"median {middle:.2f}x: {sum(time >= 1.5 for time in times)} of them to 1.5x and more" in text
    slow = {row["net"] for row in results if row["faster"] < 1.1}
    assert {"mobilenet_v3_small", "mnasnet0_5"} < slow
    assert len(slow) == 4


@pytest.mark.parametrize("net", ["vgg19", "resnet18", "gpt"])
def test_the_times_of_a_switch_are_measured(net: str) -> None:
    results = {row["version"]: row for row in results_of(f"planning_{net}.json")}
    (former,) = (row for version, row in results.items() if version != "this")
    seconds = [*(results["this"][part] for part in ("planning", "rewriting", "both")), former["both"]]
    ratio = json.loads((ROOT / "tools" / "results" / f"planning_{net}.json").read_text("utf-8"))["ratios"]["both"]
    assert f"| {net} | {' | '.join(f'{value:.2f}' for value in (*seconds, ratio))} |" in read(TOOLS)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("bench_step.json", "python tools/bench_step.py --rounds 5"),
        (
            "bench_speedup.json",
            "python tools/bench_step.py --rounds 5 --speedup 2 --nets vgg19,resnet18,resnet50",
        ),
    ],
)
def test_the_tables_of_steps_are_those_of_the_files(file: str, command: str) -> None:
    _, *lines = output_of(read(TOOLS), command).splitlines()
    for line, row in zip(lines, results_of(file), strict=True):
        assert columns(line) == [
            row["net"],
            row["policy"],
            f"{row['batch']}, {row['layout']}",
            f"{row['dense_ms']:.1f}",
            f"{row['tdfx_ms']:.1f}",
            f"{row['faster']:.2f}",
            f"{row['predicted']:.2f}",
            f"{100 * row['off']:+.0f}%",
            f"{row['plan_seconds']:.1f}",
            f"{row['factorized']}/{row['sites']}",
            f"{row['total_error']:.2f}",
        ]


def test_what_modelled_times_are_off_by_is_that_of_the_file() -> None:
    whole = next(row for row in results_of("bench_cost.json") if row["model"] == "Modelled()" and row["net"] == "all")
    text = " ".join(section(read(TOOLS), "## The cost model").split())
    assert f"a factor of {whole['gains'][0]:.2f} in a site's gain (median; {whole['gains'][1]:.2f} at" in text
    assert f"for {100 * whole['otherwise']:.0f} % of {whole['cases']:,} cases" in text

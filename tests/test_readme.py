"""The READMEs' code runs, and what they say of options, reasons, errors and files is true."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from checkout import needs, tool
from readmes import FRONT, PASSES, ROOT, TDFX, all_readmes, blocks, read, section

import tdfx
import tdfx.errors as errors_of_tdfx
from tdfx.cli import main
from tdfx.factors import registry
from tdfx.plans.plan import Reason

RANKS, COST, CLI = (ROOT / "tdfx" / folder / "README.md" for folder in ("ranks", "cost", "cli"))
TRAINING = ROOT / "tdfx" / "training" / "README.md"
PLANNED_FILES = {"passes/pipeline.py"}
"""Files that the READMEs may name before they are there."""
in_checkout = needs("train.py")
each_readme = pytest.mark.parametrize("readme", all_readmes(), ids=lambda path: str(path.relative_to(ROOT)))


def run(readme: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python blocks of a README one after the other in a folder, and return the names that they define."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_SCHEMES", dict(registry._SCHEMES))
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks(read(readme), "python"):
        exec(compile(block, str(readme), "exec"), names)
    return names


def parameters_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def test_the_front_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(FRONT, tmp_path, monkeypatch)
    assert names["report"].ok
    assert names["switch"].done
    assert names["switch"].steps == 40
    assert type(names["model"]) is type(names["reference"])
    assert parameters_of(names["optimizer"]) == {id(parameter) for parameter in names["model"].parameters()}


def test_the_ranks_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Measure for a few seconds, not for 15.
    measure = tdfx.Measured.measure
    monkeypatch.setattr(
        tdfx.Measured, "measure", lambda self, groups, spent=0.0: measure(self, groups, spent=spent + 12)
    )
    names: dict[str, Any] = {}
    budget, *others = blocks(read(RANKS), "python")
    exec(budget, names)
    out = capsys.readouterr().out
    assert "of 21 sites factorized" in out
    assert names["made"].parameters_after <= 0.5 * names["made"].parameters_before
    assert re.search(r"training step .* ms → .* ms: .*x faster; .*x was predicted", out)
    for block in others:
        exec(block, names)
    assert "AboveMean(times=1.5)" in names["made"].policy


def test_the_training_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(TRAINING, tmp_path, monkeypatch)
    assert [event.what for event in names["switch"].events] == ["switched"]
    assert isinstance(names["merged"], torch.nn.Sequential)
    assert parameters_of(names["optimizer"]) == {id(parameter) for parameter in names["merged"].parameters()}
    lowered, before = names["smaller"], names["model"]
    assert sum(map(torch.numel, lowered.parameters())) < sum(map(torch.numel, before.parameters()))


def test_the_training_readme_runs_where_the_switch_keeps_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=1e9, cost=tdfx.Modelled())
    switch = tdfx.Switch
    monkeypatch.setattr(tdfx, "Switch", lambda policy, **settings: switch(keeps, **settings))
    names = run(TRAINING, tmp_path, monkeypatch)
    assert [event.what for event in names["switch"].events] == ["kept"]
    assert isinstance(names["merged"], torch.nn.Sequential)


def test_the_compiler_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(PASSES, tmp_path, monkeypatch)
    (site,) = tdfx.plan(names["Projection"](64, 64), tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
    assert (site.kind, site.ranks) == ("Projection", (16,))
    assert names["step"].name == "keep_heads"


@pytest.mark.parametrize(
    "readme",
    [path for path in all_readmes() if path not in {FRONT, RANKS, TRAINING, PASSES}],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_other_readmes_run(readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They check themselves, by the assertions in them."""
    run(readme, tmp_path, monkeypatch)


@each_readme
def test_fragments_are_python(readme: Path) -> None:
    """Blocks of ``py`` need names from elsewhere, and are not run."""
    for block in blocks(read(readme), "py"):
        ast.parse(block)


def test_every_reason_is_explained() -> None:
    text = section(read(PASSES), "## Why a layer is kept")
    explained = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(explained) == sorted(Reason)


def test_every_error_is_explained() -> None:
    text = section(read(TDFX), "## When something is refused")
    explained = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    errors = {
        value.__name__
        for value in vars(errors_of_tdfx).values()
        if isinstance(value, type) and issubclass(value, tdfx.TdfxError)
    }
    assert sorted(explained) == sorted(errors - {"TdfxError"})


def test_the_policy_file_is_one(tmp_path: Path) -> None:
    (block,) = blocks(read(RANKS), "toml")
    (tmp_path / "policy.toml").write_text(block, encoding="utf-8")
    policy = tdfx.read_policy(tmp_path / "policy.toml")
    assert policy.rank == tdfx.VBMF().at_least(8) | tdfx.Ratio(of=0.5)
    assert policy.cost == tdfx.Measured(budget=30)
    assert policy.overrides["fc"] is None
    assert policy.for_site("layer4.0.conv1") == tdfx.Policy(
        rank=tdfx.Ratio(of=0.25), scheme="spatial", min_gain=1.1, cost=tdfx.Measured(budget=30)
    )


def shell_lines(text: str) -> list[str]:
    """Return the commands of a README: in shell blocks, in code spans, and above the blocks that show their output."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:tdfx|python tools/)[^`]*)`", text)
    return lines + re.findall(r"<!-- (?:COLUMNS=80 )?((?:tdfx|python) .*?) -->", text)


def unknown_options(command: click.Command, words: list[str]) -> set[str]:
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    return {word for word in words if word.startswith("--")} - known


@each_readme
def test_the_commands_are_those_of_the_program(readme: Path) -> None:
    for line in shell_lines(read(readme)):
        words = shlex.split(line)
        if words[0] == "tdfx" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in main.commands, line
            assert unknown_options(main.commands[words[1]], words) == set(), line


@in_checkout
@each_readme
def test_the_tools_have_the_options_that_are_named(readme: Path) -> None:
    for line in shell_lines(read(readme)):
        file = next((word for word in shlex.split(line) if word.startswith("tools/") and word.endswith(".py")), None)
        if file is not None:
            program = tool(Path(file).stem).main
            assert unknown_options(program, shlex.split(line.partition(file)[2])) == set(), line


def test_the_command_lines_readme_knows_every_command_and_option() -> None:
    text = read(CLI)
    assert set(main.commands) == {line.split()[1] for line in shell_lines(text) if line.startswith("tdfx ")} - {
        "--debug"
    }
    options = {name for parameter in main.commands["inspect"].params for name in parameter.opts if name[0] == "-"}
    assert options <= set(re.findall(r"`(--[\w-]+)", section(text, "## inspect")))
    table = text.partition("<!-- COLUMNS=80")[2].partition("```\n")[2].partition("```")[0]
    assert 60 < max(map(len, table.splitlines())) <= 80


def test_the_defaults_are_those_of_the_code() -> None:
    policy, ranks = tdfx.Policy(), read(RANKS)
    assert f"`{policy.rank!r}`, the default" in ranks
    assert f"multiples of {policy.round_to}" in ranks
    assert f"`{tdfx.Energy()!r}`" in ranks
    assert f"at least {policy.min_gain} times faster" in read(COST)
    assert f"Measured(budget={tdfx.Measured().budget:g})" in read(COST)


def test_the_front_page_is_short_and_has_the_line_that_ci_runs() -> None:
    lines = read(FRONT).splitlines()
    assert len(lines) <= 200
    assert sum(line.endswith("&& pytest") for line in lines) == 1


def anchors(readme: Path) -> set[str]:
    """Return the anchors that GitHub makes of a README's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(readme), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@in_checkout
@each_readme
def test_links_resolve(readme: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", read(readme), flags=re.DOTALL)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (readme.parent / file).resolve() if file else readme
        is_planned = any(target == ROOT / name for name in PLANNED_FILES)
        assert target.exists() or is_planned, f"{readme} links to {link}"
        assert not anchor or anchor in anchors(target), f"{readme} links to {link}"


@in_checkout
@each_readme
def test_files_that_are_named_exist(readme: Path) -> None:
    """A code span that ends like a file of the repository, and has a folder in it, names one."""
    text = re.sub(r"```.*?```", "", read(readme), flags=re.DOTALL)
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|json|toml|md))`", text):
        if not name.startswith("path/to/"):
            assert any((folder / name).exists() for folder in (ROOT, readme.parent)), f"{readme} names {name}"


@in_checkout
def test_extras_are_installed_in_one_form() -> None:
    """The front page installs a checkout, in two lines; wherever an extra is missing later, its line is the same."""
    texts = {
        path: path.read_text(encoding="utf-8") for folder in ("tdfx", "tools") for path in (ROOT / folder).rglob("*.py")
    }
    texts |= {readme: read(readme) for readme in all_readmes()}
    lines = {
        line
        for text in texts.values()
        for line in re.findall(r"pip install (?!tensorboard)(.*?\S)(?=[\s`\",]|$)", text)
    }
    extras = {"demo", "safetensors", "report", "lightning", "transformers"}
    assert lines == {"'.[demo]'", "-e", *(f"'tdfx[{extra}]'" for extra in extras)}


@in_checkout
def test_every_folder_that_is_hard_has_a_readme() -> None:
    linked = re.findall(r"\]\(([^)#]+README\.md)\)", read(FRONT))
    assert {ROOT / link for link in linked} == set(all_readmes()) - {FRONT}

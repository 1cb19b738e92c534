"""The READMEs of the checkout, and their code blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FRONT = ROOT / "README.md"
TDFX, PASSES, TOOLS = (ROOT / folder / "README.md" for folder in ("tdfx", "passes", "tools"))


def all_readmes() -> list[Path]:
    """Return every README, the front page first; ``tdfx/passes`` is a link to ``passes``."""
    folders = sorted(path for path in (ROOT / "tdfx").rglob("README.md") if "passes" not in path.parts)
    return [path for path in (FRONT, PASSES, TOOLS, *folders) if path.is_file()]


def read(readme: Path) -> str:
    """Return the text of a README, or skip the test: only the front page lies beside the tests of a wheel."""
    if not readme.is_file():
        pytest.skip(f"{readme.name} of {readme.parent.name!r} is not beside the tests")
    return readme.read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one of its level."""
    level = heading.partition(" ")[0]
    return text.partition(f"{heading}\n")[2].partition(f"\n{level} ")[0]


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def output_of(text: str, command: str) -> str:
    """Return the block that shows what a command printed."""
    block = re.search(rf"<!-- {re.escape(command)} -->\n```\n(.*?)\n```", text, re.DOTALL)
    assert block is not None, f"no block shows the output of {command!r}"
    return block.group(1)

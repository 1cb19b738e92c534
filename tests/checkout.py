"""The tools of the checkout that these tests lie in, which a wheel does not have."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def needs(file: str) -> pytest.MarkDecorator:
    """Skip where one of the tools, ``train.py``, is not there."""
    return pytest.mark.skipif(not (TOOLS / file).is_file(), reason="the checkout's tools are not beside these tests")


def tool(name: str) -> ModuleType:
    """Import one of the tools."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)

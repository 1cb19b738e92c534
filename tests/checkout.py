"""Import the programs of the checkout's tools folder, which a wheel does not have."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def needs(file: str) -> pytest.MarkDecorator:
    """Skip a test if a file of the tools folder, such as ``train.py``, is missing."""
    return pytest.mark.skipif(not (TOOLS / file).is_file(), reason="the checkout's tools are not beside these tests")


def tool(name: str) -> ModuleType:
    """Import a module of the tools folder."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    return importlib.import_module(name)

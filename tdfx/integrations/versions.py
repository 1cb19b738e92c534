"""Which versions of a trainer's framework the callbacks work with."""

from __future__ import annotations

from packaging.version import Version


def check_version(framework: str, installed: str, oldest: str) -> None:
    """Raise ImportError if a framework is older than the callbacks need.

    >>> check_version("transformers", "4.57.6", "4.57")
    """
    if Version(installed) < Version(oldest):
        raise ImportError(
            f"tdfx.integrations.{framework} works with {framework} {oldest} and newer, and {installed} is installed. "
            f"Upgrade it: the extra 'tdfx[{framework}]' asks pip for one that does."
        )

"""What goes wrong before a run begins."""

from __future__ import annotations

import click


class RecipeError(click.ClickException):
    """A setting, a data set or a file that does not do; the command line shows the message and ends with 1."""

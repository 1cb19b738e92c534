"""The error of the training recipe."""

from __future__ import annotations

import click


class RecipeError(click.ClickException):
    """A setting, a data set or a file cannot be used; the command line shows the message and exits with code 1."""

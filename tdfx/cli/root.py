"""The program itself: its commands, and what becomes of an error."""

from __future__ import annotations

from typing import Any

import click

import tdfx
from tdfx.cli import cache, demo, inspect, verify
from tdfx.cli.codes import STOPPED
from tdfx.errors import TdfxError


class _Commands(click.Group):
    """Turns the errors that tdfx raises on purpose into one message."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TdfxError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(STOPPED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tdfx.__version__, prog_name="tdfx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Train PyTorch models faster by factorizing their layers mid-training."""


for command in (inspect.inspect, demo.demo, verify.verify, cache.cache):
    main.add_command(command)

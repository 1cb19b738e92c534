"""The program: its commands, and how errors are reported."""

from __future__ import annotations

import sys
from typing import Any

import click

import tdfx
from tdfx.cli.cache import cache
from tdfx.cli.completion import completion
from tdfx.cli.demo import demo
from tdfx.cli.inspect import inspect
from tdfx.cli.merge import merge
from tdfx.cli.output import INTERRUPTED, STOPPED, say
from tdfx.cli.verify import verify
from tdfx.errors import TdfxError, first_line

_CODES = """\b
Exit codes:
  0  success; for verify: both are the same
  1  the proof of verify or demo failed
  2  the command could not be carried out; the message says why, and --debug shows where
"""


class _Commands(click.Group):
    """A group of commands that prints any error as one message, also a defect of tdfx."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            defect = (
                f"tdfx failed because of a defect in it: {type(error).__name__}: {first_line(error)}. Run it again as "
                f"tdfx --debug ... to see where, and please report it with that output."
            )
            say(f"Error: {error if isinstance(error, TdfxError) else defect}")
            ctx.exit(STOPPED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_CODES)
@click.version_option(tdfx.__version__, prog_name="tdfx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Train PyTorch models faster by factorizing their layers during training."""


for command in (inspect, merge, demo, verify, cache, completion):
    main.add_command(command)

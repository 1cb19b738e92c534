"""``tdfx cache``."""

from __future__ import annotations

import sqlite3

import click

from tdfx.cost.store import Store, cache_folder
from tdfx.errors import TdfxError


@click.command(short_help="Show or forget the times measured on this machine.")
@click.option("--clear", is_flag=True, help="Forget all of them.")
def cache(clear: bool) -> None:
    """Say where times that were measured on this machine are kept, and how many."""
    store = Store(cache_folder())
    try:
        click.echo(f"{store.clear()} times forgotten" if clear else f"{store.file}: {len(store)} times")
    except (OSError, sqlite3.Error) as error:
        raise TdfxError(
            f"The cache {str(store.file)!r} cannot be {'deleted' if clear else 'read'}: {error}. "
            + ("Delete the file yourself." if clear else "Forget it with tdfx cache --clear.")
        ) from error

"""``tdfx cache``."""

from __future__ import annotations

import sqlite3

import click

from tdfx.errors import TdfxError


@click.command(short_help="Show or delete the times measured on this machine.")
@click.option("--clear", is_flag=True, help="Delete all of them.")
def cache(clear: bool) -> None:
    """Show where times that were measured on this machine are stored, and how many there are."""
    from tdfx.cost.store import Store, cache_folder

    store = Store(cache_folder())
    try:
        click.echo(f"{store.clear()} times deleted" if clear else f"{store.file}: {len(store)} times")
    except (OSError, sqlite3.Error) as error:
        advice = "Delete the file yourself." if clear else "Delete it with tdfx cache --clear."
        raise TdfxError(
            f"The cache {str(store.file)!r} cannot be {'deleted' if clear else 'read'}: {error}. {advice}"
        ) from error

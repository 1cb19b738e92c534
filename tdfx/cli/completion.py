"""``tdfx completion``, and how bash takes a word with a colon in it."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

_VARIABLE = "_TDFX_COMPLETE"
"""By which the script that the shell has read asks the program; click's name for it."""
_NO_SPACE = """    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[:/] ]]; then
        compopt -o nospace
    fi

    return 0"""


@add_completion_class
class ColonBash(BashComplete):
    """Bash takes words apart at colons and equals signs, and completes what is after the last one."""

    name = "bash"
    source_template = BashComplete.source_template.replace("    return 0", _NO_SPACE)

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is typed, and that one, with what bash took apart put together."""
        before, incomplete = super().get_completion_args()
        words = joined([*before, incomplete])
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return an item without the part that bash holds for another word."""
        return f"{item.type},{item.value.rpartition(':')[2] or item.value}"


def joined(words: list[str]) -> list[str]:
    """Join words that bash took apart at colons and equals signs.

    >>> joined(["inspect", "torchvision", ":", "resn"]), joined(["inspect", "nets.py", ":"]), joined(["--sort", "=", ""])
    (['inspect', 'torchvision:resn'], ['inspect', 'nets.py:'], ['--sort='])
    """
    found: list[str] = []
    for word in words:
        if found and (word in {":", "="} or found[-1][-1:] in {":", "="}):
            found[-1] += word
        else:
            found.append(word)
    return found


@click.command(short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script by which SHELL completes commands, options, models and policies.

    \b
    bash: put  eval "$(tdfx completion bash)"  into ~/.bashrc
    zsh:  put  eval "$(tdfx completion zsh)"   into ~/.zshrc, after compinit
    fish: run  tdfx completion fish > ~/.config/fish/completions/tdfx.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, f"click knows {shell}"
    click.echo(kind(ctx.find_root().command, {}, "tdfx", _VARIABLE).source())

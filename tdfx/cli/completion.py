"""``tdfx completion``, and how bash completes a word with a colon in it."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

_VARIABLE = "_TDFX_COMPLETE"
"""The environment variable by which the shell's script asks the program for completions; click's name for it."""
_NO_SPACE = """    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[:/] ]]; then
        compopt -o nospace
    fi

    return 0"""


@add_completion_class
class ColonBash(BashComplete):
    """Completion for bash, which splits words at colons and equals signs and completes what is after the last one."""

    name = "bash"
    source_template = BashComplete.source_template.replace("    return 0", _NO_SPACE)

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is typed, and that word, with split words joined."""
        before, incomplete = super().get_completion_args()
        words = join_words([*before, incomplete])
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return an item without the part that bash takes for an earlier word."""
        return f"{item.type},{item.value.rpartition(':')[2] or item.value}"


def join_words(words: list[str]) -> list[str]:
    """Join words that bash split at colons and equals signs.

    >>> join_words(["inspect", "torchvision", ":", "resn"]), join_words(["inspect", "nets.py", ":"])
    (['inspect', 'torchvision:resn'], ['inspect', 'nets.py:'])
    >>> join_words(["--sort", "=", ""])
    ['--sort=']
    """
    joined: list[str] = []
    for word in words:
        if joined and (word in {":", "="} or joined[-1][-1:] in {":", "="}):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


@click.command(short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, models and policies.

    \b
    bash: put  eval "$(tdfx completion bash)"  into ~/.bashrc
    zsh:  put  eval "$(tdfx completion zsh)"   into ~/.zshrc, after compinit
    fish: run  tdfx completion fish > ~/.config/fish/completions/tdfx.fish
    """
    completion_class = get_completion_class(shell)
    assert completion_class is not None, f"click knows {shell}"
    click.echo(completion_class(ctx.find_root().command, {}, "tdfx", _VARIABLE).source())

"""Completions, as the shells ask for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from click.testing import CliRunner

import tdfx
from tdfx.cli import main

SCRIPTS = {"bash": "complete -o nosort -F", "zsh": "#compdef tdfx", "fish": "complete --no-files --command tdfx"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(
        "import os\nclass Net: pass\ndef build(): raise OSError\ndef _hidden(): pass\nready = Net()\n"
    )
    Path("notes.txt").write_text("")
    Path("policy.toml").write_text("")
    Path("network").mkdir()


def completions(*words: str) -> list[str]:
    """Return the completions of the last word for bash, which has split the words at colons and equals signs."""
    env = {"_TDFX_COMPLETE": "bash_complete", "COMP_WORDS": "\n".join(["tdfx", *words]), "COMP_CWORD": str(len(words))}
    result = CliRunner().invoke(main, [], prog_name="tdfx", env=env)
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip("\n").splitlines()
    assert all(line.startswith("plain,") for line in lines)
    return [line.removeprefix("plain,") for line in lines]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_script_of_each_shell_is_printed(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert SCRIPTS[shell] in result.stdout
    assert f"_TDFX_COMPLETE={shell}_complete" in result.stdout


def test_an_unknown_shell_is_refused() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in result.stderr


def test_commands_and_options_are_completed() -> None:
    assert completions("ins") == ["inspect"]
    assert completions("inspect", "--weig") == ["--weights"]
    assert completions("inspect", "x", "--sort", "ga") == ["gain"]
    assert completions("inspect", "x", "--sort", "=", "ga") == ["gain"]
    assert completions("inspect", "x", "--filter", "no_") == ["no_signal", "no_gain", "no_scheme"]
    assert completions("completion", "z") == ["zsh"]


def test_models_are_completed_by_name_and_by_the_names_in_files_without_running_them() -> None:
    assert completions("inspect", "torchv") == ["torchvision:"]
    assert completions("inspect", "torchvision", ":", "resnet1") == ["resnet101", "resnet152", "resnet18"]
    assert completions("inspect", "torchvision", ":") == torchvision.models.list_models()
    assert completions("inspect", "net") == ["nets.py:", "network/"]
    assert completions("inspect", "nets.py", ":") == ["Net", "build", "ready"]
    assert completions("inspect", "nets.py", ":", "b") == ["build"]
    assert completions("inspect", "missing.py", ":") == []
    Path("nets.py").write_text("def (")
    assert completions("inspect", "nets.py", ":") == []


def test_policies_are_completed_by_name_and_by_file() -> None:
    assert completions("inspect", "x", "--policy", "ene") == ["energy"]
    assert completions("inspect", "x", "--policy", "p") == ["params", "policy.toml"]
    assert completions("inspect", "x", "--policy", "missing/") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_itself_completes_a_model(tmp_path: Path) -> None:
    program = tmp_path / "tdfx"
    root = Path(tdfx.__file__).parents[1]
    program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m tdfx "$@"\n')
    program.chmod(0o755)
    (tmp_path / "script").write_text(CliRunner().invoke(main, ["completion", "bash"]).stdout)
    script = """
        source ./script
        compopt() { echo compopt "$@"; }
        COMP_WORDS=(tdfx inspect torchv); COMP_CWORD=2
        _tdfx_completion tdfx
        echo "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == ["compopt -o nospace", "torchvision:"]
    assert done.stderr == ""

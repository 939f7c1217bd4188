"""Completion of verbs and options, as the shell asks for it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest


def completions(words: str, position: int) -> list[str]:
    environment = {**os.environ, "_D2LLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    command = [sys.executable, "-c", "from d2llm.cli.main import main; main()"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("d2llm sea", 1, ["search"]),
        ("d2llm search docs.index --num", 3, ["--num-candidates"]),
        ("d2llm index docs.index sy", 3, ["sync"]),
        ("d2llm labels mer", 2, ["merge"]),
    ],
)
def test_the_shell_is_told_what_may_follow(words: str, position: int, expected: list[str]):
    assert completions(words, position) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_the_shell_is_shown(shell: str):
    """The shell is the one that called: here a real one, whatever started the tests."""
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell} here")
    line = shlex.join([sys.executable, "-m", "d2llm", "--show-completion"])
    waiting = f"{line}; true"  # a shell hands its own process to its last command
    shown = subprocess.run([shell, "-c", waiting], capture_output=True, text=True, check=True).stdout
    assert f"complete_{shell}" in shown

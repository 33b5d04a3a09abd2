"""Shell completion, through the protocol that the shells speak; it imports none of the large libraries."""

import os
import subprocess
import sys

import pytest

from helpers.command import REPORT_IMPORTS
from quantkit.cli.verbs import VERBS

LARGE = ("torch", "transformers", "datasets", "huggingface_hub", "numpy")
PROTOCOL = {"_QUANTKIT_COMPLETE": "complete_bash"}


def run(program: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def completed(line: str) -> list[str]:
    """What bash offers for the last word of a line, which may be empty."""
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = run(REPORT_IMPORTS, **PROTOCOL, **environment)
    assert done.returncode == 0, done.stderr
    assert not any(f'"{library}"' in done.stderr for library in LARGE)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("quantkit ", VERBS.choices()),
        ("quantkit qu", ["quantize"]),
        ("quantkit quantize --me", ["--method"]),
        ("quantkit serve --max-num", ["--max-num-seqs", "--max-num-batched-tokens"]),
        ("quantkit quantize --method a", ["awq", "awq+gptq"]),
        ("quantkit quantize --format ", ["compressed-tensors", "gptq", "awq"]),
        ("quantkit quantize --recipe awq", ["awq+gptq-w4", "awq-w4"]),
        ("quantkit quantize --calib wiki", ["wikitext2"]),
        ("quantkit serve model --kv-cache-dtype int4", ["int4", "int4+4"]),
        ("quantkit generate model --spec d", ["draft:"]),
        ("quantkit convert in out --format g", ["gptq"]),
        ("quantkit generate model --spec q", ["qspec", "quantspec"]),
        ("quantkit eval model --kv-policy s", ["sinks", "scored"]),
    ],
)
def test_bash(line: str, offered: list[str]) -> None:
    assert completed(line) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_names_the_program(shell: str) -> None:
    program = "from quantkit.cli import main; main()"
    done = run(program, "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_QUANTKIT_COMPLETE" in done.stdout
    assert "quantkit" in done.stdout

"""One quantization and one evaluation through the command line, as a user would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command import quantkit

FAST = ("--samples", "8", "--seq-len", "64")
RECIPES = ["rtn-w4", "awq-w4", "gptq-w4", "awq+gptq-w4", "gptq-w3", "gptq-w2", "gptq-w8", "mixed-w4"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantize_then_eval(llama_bf16: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    done = quantkit("quantize", llama_bf16, "-o", out, "--recipe", recipe, *FAST, "-q")
    assert done.status == 0, done.err
    assert not (tmp_path / "out.partial").exists()
    sizes = ("--windows", "4", "--seq-len", "64")
    done = quantkit("eval", out, "--baseline", llama_bf16, *sizes, "--json", "-")
    assert done.status == 0, done.err
    metrics = json.loads(done.out)["model"]["metrics"]
    assert 0 < metrics["kl_mean"] < 5


def test_installed_command(llama_bf16: Path, tmp_path: Path) -> None:
    """The console script in a process of its own: no library adds a line to what we print."""
    arguments = ["quantize", llama_bf16, "-o", tmp_path / "out", *FAST]
    command = [str(Path(sys.executable).parent / "quantkit"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stderr.splitlines()] == ["block 1/3", "block 2/3", "block 3/3"]
    assert "worst five" in done.stdout
    assert (tmp_path / "out" / "quantkit.json").is_file()

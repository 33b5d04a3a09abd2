"""One quantization and one evaluation through the command line, as a user would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAST = ["--samples", "8", "--seq-len", "64", "-q"]


def quantkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([Path(sys.executable).parent / "quantkit", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("recipe", ["rtn-w4", "awq-w4", "gptq-w4", "awq+gptq-w4", "gptq-w3", "gptq-w2", "gptq-w8", "mixed-w4"])
def test_quantize_then_eval(llama_bf16: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    done = quantkit("quantize", str(llama_bf16), "-o", str(out), "--recipe", recipe, *FAST)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out.partial").exists()
    report = tmp_path / "eval.json"
    sizes = ["--windows", "4", "--seq-len", "64", "-q"]
    done = quantkit("eval", str(out), "--baseline", str(llama_bf16), *sizes, "--json", str(report))
    assert done.returncode == 0, done.stderr
    metrics = json.loads(report.read_text())["model"]["metrics"]
    assert 0 < metrics["kl_mean"] < 5

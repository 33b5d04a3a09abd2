"""The embedded model, quantized and measured: numbers that mean something, which tiny random models cannot give."""

import json
from pathlib import Path

import pytest

from helpers.command import quantkit

#: The model lies on a grid of 4 bits already, to which rounding is nearly free: 3 bits are where methods differ.
CALIBRATION = ("--samples", "8", "--seq-len", "512", "--group-size", "64", "--bits", "3", "--asym")
WINDOWS = ("--windows", "2", "--seq-len", "512")


@pytest.fixture(autouse=True)
def _shared_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model is made once for a machine, not once for a test run."""
    monkeypatch.delenv("QUANTKIT_CACHE")


def divergence(out: Path, method: str) -> float:
    """Mean KL divergence from the original, nats."""
    done = quantkit("quantize", "demo", "-o", out, "--method", method, *CALIBRATION, "-q")
    assert done.status == 0, done.err
    done = quantkit("eval", out, "--baseline", "demo", *WINDOWS, "--json", "-")
    assert done.status == 0, done.err
    metrics = json.loads(done.out)["model"]["metrics"]
    return float(metrics["kl_mean"])


@pytest.mark.slow
def test_gptq_keeps_what_rounding_loses(tmp_path: Path) -> None:
    rounded, solved = divergence(tmp_path / "rtn", "rtn"), divergence(tmp_path / "gptq", "gptq")
    # Measured: 0.28 and 1.14. Other processors order sums differently, which moves both by some percent.
    assert solved < 0.4
    assert solved < rounded / 2


@pytest.mark.slow
@pytest.mark.parametrize("length", ["4", "auto"])
def test_speculation_changes_no_token(tmp_path: Path, length: str) -> None:
    done = quantkit("quantize", "demo", "-o", tmp_path / "w4", "--method", "rtn", "--bits", "4", "-q")
    assert done.status == 0, done.err
    prompts = ["1, 2, 3, 4, 5, 6, 7, 8,", "The lighthouse keeper had lived on the island for", "def add(a, b):\n"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    common = ("--prompts", tmp_path / "prompts.jsonl", "--max-tokens", 64, "--ignore-eos", "--json", "-", "-q")
    texts, stats = {}, {}
    for spec in ("off", "ngram", f"draft:{tmp_path / 'w4'}"):
        done = quantkit("generate", "demo", *common, "--spec", spec, "--draft-len", length)
        assert done.status == 0, done.err
        found = json.loads(done.out)
        texts[spec] = [completion["token_ids"] for completion in found["completions"]]
        stats[spec] = found["summary"]["speculation"]
        assert texts[spec] == texts["off"]
        if length == "4" and spec != "off":
            assert stats[spec]["mean_accepted_length"] > 1.5

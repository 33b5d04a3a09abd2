"""Quality, cost and memory of every method on one model, on equal calibration and evaluation tokens.

Terms: ppl and KL as `quantkit eval` defines them (float32, dequantized weights); CPU s is user + system time of the whole
`quantkit quantize` process; peak MB its largest resident set. One process a cell, one after another.

The base model is the demo moved off its 4-bit grid (`--maker`), since rounding to a grid that the weights already lie on is
nearly free. Calibration: the first 64 rows of 512 tokens of `--text`; evaluation: 10 windows of 1,024 tokens from the last
fifth of it, or from `--eval-text`.

usage: python -m benchmarks.quality [--cells gptq:4:sym,rtn:4:asym,...] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_machine
from quantkit.checkpoint.demo import demo_folder

QUANTKIT = [sys.executable, "-c", "from quantkit.cli import main; main()"]
METHODS = ("rtn", "awq", "gptq", "awq+gptq")
CELLS = [f"{m}:{bits}:{grid}" for bits in (4, 3, 2) for grid in ("sym", "asym") for m in METHODS]
COLUMNS = ("method", "bits", "grid", "ppl", "KL", "top-1", "bits/w", "CPU s", "wall s", "peak MB")


def run(arguments: list[str]) -> tuple[float, float, float]:
    """Run quantkit; CPU seconds, wall seconds and peak resident MB of that process alone."""
    started = time.monotonic()
    child = subprocess.Popen([*QUANTKIT, *arguments, "-q"])
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: quantkit {' '.join(arguments)}")
    return used.ru_utime + used.ru_stime, time.monotonic() - started, used.ru_maxrss * 1024 / 1e6


def cell(name: str, base: Path, calibration: Path, evaluation: Path, scratch: Path) -> dict[str, object]:
    """One row of the table."""
    method, bits, grid = name.split(":")
    out, report = scratch / "out", scratch / "eval.json"
    quantize = ["quantize", str(base), "-o", str(out), "--method", method, "--bits", bits, f"--{grid}", "--overwrite"]
    cpu, wall, peak = run(
        [*quantize, "--group-size", "64", "--calib", str(calibration), "--samples", "64", "--seq-len", "512"]
    )
    run(["eval", str(out), "--baseline", str(base), "--text", str(evaluation), "--json", str(report)])
    model = json.loads(report.read_text())["model"]
    metrics = model["metrics"]
    numbers = (metrics["perplexity"], metrics["kl_mean"], metrics["top1_agreement"], model["bits_per_weight"], cpu, wall, peak)
    return dict(zip(COLUMNS, (method, bits, grid, *(round(float(n), 4) for n in numbers)), strict=True))


def main() -> None:
    """Print one row per cell as soon as it is measured, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path("../shared")
    parser.add_argument("--base", type=Path, help="the quality base; made with --maker when it is not named")
    parser.add_argument("--maker", type=Path, default=shared / "tools/make_quality_base.py")
    parser.add_argument("--text", type=Path, default=shared / "data/wikitext2-valid.txt")
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        base = options.base or scratch / "base"
        if options.base is None:
            subprocess.run([sys.executable, options.maker, demo_folder(), base], check=True, capture_output=True)
        evaluation = options.eval_text
        if evaluation is None:
            evaluation, text = scratch / "eval.txt", options.text.read_text(encoding="utf-8")
            evaluation.write_text(text[len(text) * 4 // 5 :], encoding="utf-8")
        print(" | ".join(COLUMNS))
        for name in options.cells.split(","):
            rows.append(cell(name, base, options.text, evaluation, scratch))
            print(" | ".join(str(value) for value in rows[-1].values()), flush=True)
    result = json.dumps({"machine": describe_machine(), "cells": rows}, indent=2)
    print(result)
    if options.json:
        options.json.write_text(result + "\n")


if __name__ == "__main__":
    main()

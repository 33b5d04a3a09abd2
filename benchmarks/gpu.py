"""Run all tests and benchmarks for a machine with an NVIDIA GPU, in one call from the source tree.

    tests     the kernels' tests, with kernels compiled instead of interpreted, and tests of whole models on the GPU
    kernels   benchmarks.kernels: 4-bit matmuls and attention; then kernels-8bit, -3bit and -2bit: matmuls of 8, 3 and 2 bits
    speed     `quantkit eval --speed` for a random Llama of 1.1B parameters (or for --model), in 16 bits and in 4 bits

Each step runs in a separate process and is stopped after --limit seconds. If a step fails, the others still run. FOLDER
receives NAME.log with the output of each step, NAME.json with its measurements, and summary.json with the machine and the
outcome of each step. The kernels' tuned configs are kept in FOLDER too, and the next run into the same folder reuses them.

usage: python -m benchmarks.gpu [--out FOLDER] [--only tests,kernels,...] [--model MODEL] [--limit 1800]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PYTHON = [sys.executable, "-m"]
#: Without the current folder in the import path: its `kernels` would be mistaken for the distribution of that name.
PYTEST = [sys.executable, "-c", "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"]
GPU_TESTS = ["tests/kernels", "tests/runtime/engine/test_gpu.py"]


def steps(out: Path, model: str | None) -> dict[str, list[str]]:
    """Name -> command of each step; steps that measure write to NAME.json."""

    def kernels(name: str, *options: str) -> list[str]:
        return [*PYTHON, "benchmarks.kernels", "--json", str(out / f"{name}.json"), *options]

    return {
        "tests": [*PYTEST, "-q", "-ra", f"--junitxml={out / 'tests.xml'}", *GPU_TESTS],
        "kernels": kernels("kernels"),
        **{f"kernels-{bits}bit": kernels(f"kernels-{bits}bit", "--bits", str(bits), "--skip-attention") for bits in (8, 3, 2)},
        "speed": [*PYTHON, "benchmarks.gpu", "--measure", *([model] if model else []), "--out", str(out)],
    }


def run_step(name: str, command: list[str], out: Path, limit: float) -> dict[str, Any]:
    """Run one step with its output going to NAME.log; returns its outcome."""
    environment = {**os.environ, "QUANTKIT_CACHE": os.environ.get("QUANTKIT_CACHE", str(out / "cache"))}
    started = time.monotonic()
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
            status = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:g} s"
    return {"status": status, "seconds": round(time.monotonic() - started, 1), "command": command}


def run_all(chosen: dict[str, list[str]], out: Path, limit: float, machine: dict[str, Any]) -> bool:
    """Run the steps one after another; returns whether all succeeded. The summary is written after each step."""
    ended: dict[str, dict[str, Any]] = {}
    for name, command in chosen.items():
        ended[name] = run_step(name, command, out, limit)
        print(f"{name}: {ended[name]['status']} in {ended[name]['seconds']} s", flush=True)
        (out / "summary.json").write_text(json.dumps({"machine": machine, "steps": ended}, indent=1) + "\n", encoding="utf-8")
    return all(each["status"] == "ok" for each in ended.values())


def describe_machine() -> dict[str, Any]:
    """The GPU and the software versions that the numbers were measured with."""
    properties = torch.cuda.get_device_properties(0)
    names = ("torch", "triton", "transformers", "gemlite")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in names if find_spec(name)},
    }


def measure_speed(model: str | None, out: Path) -> None:
    """Measure the speed of a model in 16 bits and in 4 bits, each in a separate process, and write speed.json."""
    from benchmarks.memory import MODELS, make_checkpoint
    from benchmarks.quality import run
    from quantkit.checkpoint.locate import locate
    from quantkit.evaluation.speed import measure_in_subprocess

    with tempfile.TemporaryDirectory() as scratch:
        dense, packed = Path(scratch) / "model", Path(scratch) / "packed"
        if model is None:
            dense.mkdir()
            make_checkpoint(dense, *MODELS["1.1B, 22 blocks"], tokenizer=False)
        else:
            dense = locate(model)
        run(["quantize", str(dense), "-o", str(packed), "--method", "rtn", "--bits", "4"])
        folders = {"16 bit": dense, "4 bit": packed}
        found = {name: asdict(measure_in_subprocess(folder, torch.device("cuda"))) for name, folder in folders.items()}
    result = json.dumps(found, indent=1)
    print(result)
    (out / "speed.json").write_text(result + "\n", encoding="utf-8")


def main() -> None:
    """Run the chosen steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/gpu")), help="default: $OUT, or out/gpu")
    parser.add_argument("--only", help="names of steps, separated by commas; default: all")
    parser.add_argument("--model", help="model folder or name; default: a random model of 1.1B parameters")
    parser.add_argument("--limit", type=float, default=1800, help="stop a step after this many seconds")
    parser.add_argument("--measure", nargs="?", const="", help=argparse.SUPPRESS)  # the process of the step `speed`
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        raise SystemExit(2)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.measure is not None:
        measure_speed(options.measure or None, out)
        return
    known = steps(out, options.model)
    names = options.only.split(",") if options.only else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only: there is no step {unknown[0]!r}; choose from {', '.join(known)}")
    raise SystemExit(not run_all({name: known[name] for name in names}, out, options.limit, describe_machine()))


if __name__ == "__main__":
    main()

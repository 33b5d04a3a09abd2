"""Speed on one machine, one process after another: quantkit in 16 and in 4 bits, llama.cpp Q4_0, transformers.

quantkit.evaluation.speed defines the terms. Every engine runs the demo model with as many threads as torch would use. The
4-bit artifacts are made here by rounding to nearest (the choice of codes does not change the speed), once with the output head
in 16 bit and once in 8 bit, which is closest to llama.cpp's Q4_0. llama.cpp is measured if `llama-cpp-python` is installed and
`--gguf` names a Q4_0 file of the model.

At the end come ratios against llama.cpp Q4_0 (the goal is 1.3 in tg128) and against transformers. transformers runs last,
because in bfloat16 it takes minutes on processors without instructions for that type. `--turns N` runs quantkit and llama.cpp
N more times alternately, so that a change of the machine's speed affects both.

usage: python -m benchmarks.speed [--model demo] [--gguf FILE] [--turns 0] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.quality import QUANTKIT
from quantkit.checkpoint.locate import locate
from quantkit.evaluation.speed import measure_in_subprocess

COLUMNS = ("engine", "pp128", "pp512", "tg128", "TTFT ms", "TPOT ms", "16 concurrent", "load s", "peak MB")
RECIPES = {
    "quantkit 4-bit": "{method: rtn, bits: 4, group_size: 64}",
    "quantkit 4-bit, 8-bit head": "{method: rtn, bits: 4, group_size: 64, rules: [{match: ^lm_head$, bits: 8}]}",
}


def quantized(model: Path, recipe: str, out: Path) -> Path:
    """Make an artifact by rounding to nearest."""
    file = out.with_suffix(".yaml")
    file.write_text(recipe)
    subprocess.run([*QUANTKIT, "quantize", str(model), "-o", str(out), "-q", "--recipe", str(file)], check=True)
    return out


def peer(*arguments: str) -> dict[str, Any]:
    """Run one of the other engines."""
    command = [sys.executable, "-m", "benchmarks.speed_peers", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def row(name: str, r: dict[str, Any]) -> str:
    """One line of the table."""
    rates = [f"{r['rates'][k]['mean']:.0f} ± {r['rates'][k]['sd']:.0f}" for k in ("pp128", "pp512", "tg128")]
    times = [f"{1000 * r['ttft_seconds']:.0f}", f"{1000 * r['tpot_seconds']:.2f}", f"{r['system_tps']['16']:.0f}"]
    return " | ".join([name, *rates, *times, f"{r['load_seconds']:.2f}", f"{r['peak_memory_bytes'] / 1e6:.0f}"])


def ratios(results: dict[str, dict[str, Any]], base: str) -> dict[str, dict[str, float]]:
    """Every engine's rates divided by those of `base`."""

    def numbers(r: dict[str, Any]) -> dict[str, float]:
        return {k: v["mean"] for k, v in r["rates"].items()} | {"16 concurrent": r["system_tps"]["16"]}

    below = numbers(results[base])
    return {name: {k: round(v / below[k], 3) for k, v in numbers(r).items()} for name, r in results.items() if name != base}


def take_turn(artifact: Path, gguf: str) -> dict[str, float]:
    """quantkit's rates divided by llama.cpp's, measured one after the other."""
    pair = {"quantkit": asdict(measure_in_subprocess(artifact, torch.device("cpu"))), "llama.cpp": peer("llama.cpp", gguf)}
    for name, result in pair.items():
        print(row(name, result), flush=True)
    return ratios(pair, "llama.cpp")["quantkit"]


def as_json(results: dict[str, dict[str, Any]], turns: list[dict[str, float]]) -> str:
    """Everything measured so far, and the ratios."""
    bases = [name for name in ("llama.cpp Q4_0", "transformers float32", "transformers bfloat16") if name in results]
    return json.dumps(
        {
            "machine": describe_machine(),
            "results": results,
            "ratios": {base: ratios(results, base) for base in bases},
            "turns": turns,
        },
        indent=2,
    )


def main() -> None:
    """Print one row per engine when it has been measured, then the ratios, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--gguf", help="Q4_0 file of the same model; without it llama.cpp is left out")
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, cpu = locate(options.model), torch.device("cpu")
    results: dict[str, dict[str, Any]] = {}
    turns: list[dict[str, float]] = []

    def show(name: str, result: dict[str, Any]) -> None:
        results[name] = result
        print(row(name, result), flush=True)
        if options.json:  # keeps what was measured even if a slow engine is interrupted
            options.json.write_text(as_json(results, turns) + "\n")

    print(" | ".join(COLUMNS))
    with tempfile.TemporaryDirectory() as scratch:
        show("quantkit bf16", asdict(measure_in_subprocess(model, cpu)))
        for number, (name, recipe) in enumerate(RECIPES.items()):
            artifact = quantized(model, recipe, Path(scratch) / str(number))
            show(name, asdict(measure_in_subprocess(artifact, cpu)))
        if options.gguf and not find_spec("llama_cpp"):
            print("llama.cpp is left out: llama-cpp-python is not installed", flush=True)
        elif options.gguf:
            show("llama.cpp Q4_0", peer("llama.cpp", options.gguf))
            turns.extend(take_turn(artifact, options.gguf) for _ in range(options.turns))
    for dtype in ("float32", "bfloat16"):
        show(f"transformers {dtype}", peer("transformers", str(model), dtype))
    print(as_json(results, turns))


if __name__ == "__main__":
    main()

"""The features of quantkit, switched on one after another on one model. Each row is measured in its own process.

    bf16          the unquantized checkpoint, one request after another
    4 bit         awq+gptq with group size 64, lm_head in 8 bits
    + batched     requests share steps, and common prefixes share blocks of the paged cache
    + KV int8     keys and values in 8 bits
    + speculation n-gram drafts with adaptive length

ppl comes from `quantkit eval` (through the engine's KV cache if that is quantized). The other numbers come from `quantkit
generate` with `--requests` prompts of the built-in text that all arrive at once. TTFT: mean of first token - arrival,
including the time spent waiting. TPOT: 1 / mean of (n - 1) / (end - first token). tokens/s: all output tokens / wall-clock
time. peak memory: largest resident set size, including the part of the KV cache that was touched.

usage: python -m benchmarks.stack [--model demo] [--samples 16] [--requests 16] [--tokens 64] [--windows 4] [--json FILE]
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.quality import QUANTKIT

COLUMNS = ("layer", "ppl", "TTFT ms", "TPOT ms", "tokens/s", "peak MB")
#: Layer -> options that it adds to `generate`, and to `eval` if it changes what the model computes.
LAYERS: dict[str, tuple[list[str], list[str]]] = {
    "bf16": ([], []),
    "4 bit": ([], []),
    "+ batched": (["--max-batch", "16"], []),
    "+ KV int8": (["--kv-dtype", "int8"], ["--kv-dtype", "int8"]),
    "+ speculation": (["--spec", "ngram"], []),
}
UNBATCHED = ["--max-batch", "1"]
RECIPE = "{method: awq+gptq, bits: 4, symmetric: false, group_size: 64, rules: [{match: ^lm_head$, bits: 8}]}"


def quantkit(*arguments: str) -> Any:
    """Run a command; returns its JSON report."""
    done = subprocess.run([*QUANTKIT, *arguments, "-q", "--json", "-"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def write_prompts(path: Path, count: int) -> None:
    """Write prompts of about 130 tokens each, spread evenly over the built-in text."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    starts = range(0, len(text), len(text) // count)
    path.write_text("".join(json.dumps({"prompt": text[at : at + 500]}) + "\n" for at in starts[:count]), encoding="utf-8")


def rows(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Measure the layers; yields one row per layer."""
    prompts, artifact, recipe = scratch / "prompts.jsonl", scratch / "artifact", scratch / "recipe.yaml"
    write_prompts(prompts, options.requests)
    recipe.write_text(RECIPE)
    samples = ("--samples", str(options.samples))
    quantkit("quantize", options.model, "-o", str(artifact), "--recipe", str(recipe), *samples)
    running: list[str] = []
    measured: list[str] = []
    perplexity: dict[tuple[str, ...], float] = {}
    for name, (generating, evaluating) in LAYERS.items():
        model = options.model if name == "bf16" else str(artifact)
        running, measured = running + generating, measured + evaluating
        batch = [] if "--max-batch" in running else UNBATCHED
        asked = (model, *measured)
        if asked not in perplexity:
            found = quantkit("eval", *asked, "--windows", str(options.windows))
            perplexity[asked] = found["model"]["metrics"]["perplexity"]
        length = ["--max-tokens", str(options.tokens), "--ignore-eos", "--max-model-len", "1024"]
        summary = quantkit("generate", model, "--prompts", str(prompts), *length, *batch, *running)["summary"]
        numbers = (1e3 * summary["ttft_seconds"], 1e3 / summary["decode_tps"], summary["output_tps"])
        peak = summary["peak_memory_bytes"] / 1e6
        yield dict(zip(COLUMNS, (name, *(round(n, 3) for n in (perplexity[asked], *numbers, peak))), strict=True))


def main() -> None:
    """Print one row per layer as soon as it is measured, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(" | ".join(COLUMNS), flush=True)
    measured: list[dict[str, Any]] = []
    report = {"machine": describe_machine(), "layers": measured}
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(options, Path(scratch)):
            measured.append(row)
            print(" | ".join(str(value) for value in row.values()), flush=True)
            if options.json:  # written after every row, so that an interrupted run keeps its rows
                options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

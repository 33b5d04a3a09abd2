"""Memory, speed and quality of each KV dtype (`--kv-dtype`), for one sequence on a CPU.

Terms:

    bytes   bytes per token in the cache, over all layers; tail pages are not counted
    tg@N    decoded tokens per second after N tokens of context: 1 / median seconds of 32 steps of one token
    ppl     perplexity, KL = mean KL divergence in nats from the same model without a cache in float32, both by `quantkit eval`
            with the same KV dtype, and so through the same kernels

The dtypes are measured one after another, speed first; nothing else may run meanwhile.

usage: python -m benchmarks.kv_cache [--model demo] [--contexts 256,2048,4096] [--windows 4] [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from quantkit.checkpoint.locate import locate
from quantkit.evaluation.run import EvalRequest, run_evaluation
from quantkit.evaluation.speed import prompt_tokens
from quantkit.runtime.core.batch import single_sequence_batch
from quantkit.runtime.kv_cache.dtypes import KV_DTYPES
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import open_model

CPU = torch.device("cpu")
NEW, CHUNK, SEQ_LEN = 32, 512, 1024


def decode_rates(folder: Path, dtype: str, contexts: list[int]) -> dict[int, float]:
    """Tokens per second after each of some numbers of context tokens, which ascend."""
    options = CacheOptions(max_model_len=contexts[-1] + NEW, max_batch=1, step_tokens=CHUNK, dtype=dtype)
    model = open_model(folder, CPU, options)
    tokens = torch.tensor(prompt_tokens(contexts[-1] + NEW, model.vocab_size))
    rates, done = {}, 0
    for context in contexts:
        for start in range(done, context, CHUNK):
            model.forward(single_sequence_batch(tokens[start : min(start + CHUNK, context)], start, model.block_size))
        seconds = []
        for position in range(context, context + NEW):
            started = time.perf_counter()
            model.forward(single_sequence_batch(tokens[position : position + 1], position, model.block_size))
            seconds.append(time.perf_counter() - started)
        rates[context], done = 1 / statistics.median(seconds), context + NEW
    return rates


def measure(folder: Path, dtype: str, contexts: list[int], windows: int) -> dict[str, Any]:
    """All measurements of one KV dtype."""
    rates = decode_rates(folder, dtype, contexts)
    request = EvalRequest(folder, folder, "builtin", windows, SEQ_LEN, CPU, dtype)
    report = run_evaluation(request, lambda stage, done, total: None)
    metrics = report.model.metrics
    return {
        "bytes_per_token": report.kv_bytes_per_token,
        "tokens_per_second": rates,
        "perplexity": metrics.perplexity,
        "kl_mean": metrics.kl_mean,
        "top1_agreement": metrics.top1_agreement,
    }


def row(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    rates = [f"{rate:.1f}" for rate in result["tokens_per_second"].values()]
    quality = [f"{result['perplexity']:.3f}", f"{result['kl_mean']:.5f}", f"{result['top1_agreement']:.1%}"]
    return " | ".join([name, f"{result['bytes_per_token']:,.0f}", *rates, *quality])


def main() -> None:
    """Print one row per KV dtype as soon as it is measured, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--contexts", default="256,2048,4096")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    contexts = sorted(int(context) for context in options.contexts.split(","))
    folder, results = locate(options.model), {}
    print(" | ".join(["type", "bytes", *(f"tg@{context}" for context in contexts), "ppl", "KL", "top-1"]), flush=True)
    for dtype in KV_DTYPES:
        results[dtype] = measure(folder, dtype, contexts, options.windows)
        print(row(dtype, results[dtype]), flush=True)
        result = json.dumps(
            {"machine": describe_machine(), "model": options.model, "threads": torch.get_num_threads(), "results": results},
            indent=2,
        )
        if options.json:  # Written after every dtype, so that results are kept if a later one is interrupted.
            options.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()

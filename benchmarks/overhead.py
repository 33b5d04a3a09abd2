"""Overhead of the engine: the share of a step that is not spent in the model's forward pass, with 16 concurrent requests.

A random Llama of about 1.1B parameters is rounded to 4 bits and serves 16 greedy requests (32 prompt tokens, 64 new tokens
each). For steps in which all 16 decode, the whole step and its `Model.forward` are timed. overhead = (step - forward) / step,
computed from the medians.

usage: python -m benchmarks.overhead [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.memory import MODELS, make_checkpoint
from benchmarks.quality import run
from quantkit.evaluation.speed import prompt_tokens
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model

SEQUENCES = 16


class Timed:
    """A model that records how long each forward pass took."""

    def __init__(self, model: ModelRunner) -> None:
        self.model, self.forwards = model, [0.0]
        self.vocab_size, self.context, self.max_model_len = model.vocab_size, model.context, model.max_model_len
        self.block_size, self.num_blocks = model.block_size, model.num_blocks
        self.sliding_window = model.sliding_window
        self.copy_blocks = model.copy_blocks

    def forward(self, batch: Batch) -> Tensor:
        """Run and time the model."""
        started = time.perf_counter()
        logits = self.model.forward(batch)
        self.forwards.append(time.perf_counter() - started)
        return logits


def measure(folder: Path) -> dict[str, float]:
    """Medians over the decode steps of the full batch, in ms, and the overhead."""
    model = Timed(open_model(folder, torch.device("cpu"), CacheOptions(max_batch=SEQUENCES, max_model_len=256)))
    engine = Engine(model, EngineConfig(max_batch=SEQUENCES))
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    for number in range(SEQUENCES):
        engine.add(Request(prompt_tokens(32, model.vocab_size, number), params))
    steps, forwards = [], []
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        spent = time.perf_counter() - started
        if len(outputs) == SEQUENCES and all(len(output.token_ids) == 1 for output in outputs):
            steps.append(spent)
            forwards.append(model.forwards[-1])
    step, forward = statistics.median(steps), statistics.median(forwards)
    return {"steps": len(steps), "step ms": 1e3 * step, "forward ms": 1e3 * forward, "overhead": (step - forward) / step}


def main() -> None:
    """Create the model, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hidden, wide, blocks = MODELS["1.1B, 22 blocks"]
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "model", Path(scratch) / "out"
        source.mkdir()
        make_checkpoint(source, hidden, wide, blocks)
        run(["quantize", str(source), "-o", str(out), "--method", "rtn", "--bits", "4"])
        result = json.dumps({"machine": describe_machine(), **measure(out)}, indent=2)
    print(result)
    if options.json:
        options.json.write_text(result + "\n")


if __name__ == "__main__":
    main()

"""The cost of a KV budget: perplexity of a long text for each policy compared with the full cache, and needles retrieved.

ppl: exp(mean negative log-likelihood) over the tokens of one text. Each token sees what the policy kept of the text before it.
The first `--skip` tokens are left out; it should be at least the largest budget, so that every budget is full.
change: relative change of ppl against the full cache on the same tokens.
needle: a sentence with a number is placed at a depth of a text of `--needle-tokens` tokens; the last words ask for the number.
kept: share of the needle's blocks that are still held when the question comes.
found: greedy decoding gives the number.
nll: mean negative log-likelihood of the number's tokens.
tokens/s: speed of the perplexity run. A budget slows it down, because blocks are dropped between chunks, which are short then.

usage: python -m benchmarks.long_context [--model demo] [--tokens 2048] [--budgets 256,512] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.machine import describe_machine
from quantkit.checkpoint.locate import locate
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.data.corpus import evaluation_rows
from quantkit.evaluation.metrics import measure_logits
from quantkit.evaluation.paged import paged_logits, scored_text
from quantkit.runtime.kv_cache.eviction import POLICIES, Budget, Eviction
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model

NEEDLE, QUESTION, ANSWER = "\nThe magic number of Lisbon is 7349162.\n", "\nThe magic number of Lisbon is", " 7349162"
DEPTHS = (0.1, 0.5, 0.9)


def perplexity(model: ModelRunner, tokens: list[int], skip: int, dropping: Eviction | None) -> dict[str, float]:
    """Measure ppl and tokens/s on a text."""
    started = time.monotonic()

    def chunks(_: int) -> Iterator[torch.Tensor]:
        done = 0
        for logits in paged_logits(model, scored_text(tokens[:-1]), dropping):
            yield logits[max(skip - 1 - done, 0) :]
            done += len(logits)

    metrics = measure_logits(chunks, torch.tensor([tokens[skip - 1 :]]))
    return {"ppl": metrics.perplexity, "tokens/s": (len(tokens) - 1) / (time.monotonic() - started)}


def needle(
    model: ModelRunner, tokenizer: PreTrainedTokenizerBase, filler: list[int], depth: float, dropping: Eviction | None
) -> dict[str, float]:
    """Measure kept, found and nll of a needle at a depth of the filler text."""
    hidden, asked, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (NEEDLE, QUESTION, ANSWER))
    first = int(depth * len(filler))
    text = [*filler[:first], *hidden, *filler[first:], *asked, *answer]
    sequence = scored_text(text[:-1])
    # Only the logits after the question are needed.
    rows = torch.cat([logits[-len(answer) :] for logits in paged_logits(model, sequence, dropping)])[-len(answer) :]
    losses = torch.nn.functional.cross_entropy(rows, torch.tensor(answer), reduction="none")
    blocks = set(range(first // model.block_size, (first + len(hidden) - 1) // model.block_size + 1))
    kept = len(blocks & set(sequence.logical_blocks)) / len(blocks)
    return {"kept": kept, "found": float(rows.argmax(-1).tolist() == answer), "nll": float(losses.mean())}


def main() -> None:
    """Print one row per policy and budget as soon as it is measured, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--needle-tokens", type=int, default=768)
    parser.add_argument("--skip", type=int, default=1024)
    parser.add_argument("--budgets", default="256,512")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = locate(options.model)
    model = open_model(folder, torch.device("cpu"), CacheOptions(max_model_len=options.tokens, max_batch=1))
    tokenizer = load_tokenizer(Checkpoint(folder))
    tokens = evaluation_rows(options.text, 1, options.tokens, tokenizer)[0].tolist()
    cells: list[tuple[str, int | None]] = [("full", None)]
    cells += [(policy, int(budget)) for budget in options.budgets.split(",") for policy in POLICIES]
    rows: list[dict[str, object]] = []
    columns = [f"needle at {depth:.0%}: kept, found, nll" for depth in DEPTHS]
    print(" | ".join(["policy", "budget", "ppl", "change", "tokens/s", *columns]))
    for policy, budget in cells:
        dropping = Budget(policy, budget).eviction(model.block_size)
        row: dict[str, object] = {"policy": policy, "budget": budget}
        measured = perplexity(model, tokens, options.skip, dropping)
        full = rows[0]["ppl"] if rows else measured["ppl"]
        assert isinstance(full, float)
        row |= measured | {"change": measured["ppl"] / full - 1}
        needles = {f"{depth}": needle(model, tokenizer, tokens[: options.needle_tokens], depth, dropping) for depth in DEPTHS}
        rows.append(row | {"needles": needles})
        found = " | ".join(f"{n['kept']:.0%} {'yes' if n['found'] else 'no'} {n['nll']:.2f}" for n in needles.values())
        change, rate = measured["ppl"] / full - 1, measured["tokens/s"]
        print(f"{policy} | {budget or ''} | {measured['ppl']:.3f} | {change:+.2%} | {rate:.0f} | {found}", flush=True)
    target = vars(options).pop("json")
    result = json.dumps({"machine": describe_machine(), "arguments": vars(options), "rows": rows}, indent=2)
    print(result)
    if target:
        target.write_text(result + "\n")


if __name__ == "__main__":
    main()

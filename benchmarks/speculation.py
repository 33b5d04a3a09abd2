"""Speculative generation against none, on texts that suit it and texts that do not: one request at a time, one process.

    tok/s       (tokens - 1) / (end - first token), the median of the repeats
    speed-up    tok/s over that of the `off` beside it, the median of the repeats (and their quartiles)
    accepted    drafted tokens that were accepted
    tokens/draft  tokens that a verified draft gave, the one behind it included
    cost        seconds of a draft step / seconds of a step that verifies

Modes run in turn, repeat by repeat (two at least), back and forth, so that a machine that slows down slows all of them; every
run starts with an engine that has learned nothing. `same` says whether the tokens are those of `off`, as they must be.

Texts: `repetitive` continues a table, `ordinary` continues prose, both greedily; `random` goes on with random digits, sampled
from the ten likeliest tokens, so that every pair of tokens has occurred before and says nothing about the next.

usage: python -m benchmarks.speculation [--model demo] [--draft MODEL | --qspec 4|8 | --quantspec] [--tokens 128]
           [--repeats 5] [--context TOKENS] [--json FILE]

Without --draft: prompt lookup. A draft model is any artifact with the model's tokenizer. With --qspec the model, an artifact,
drafts for itself with activations of so many bits; with --quantspec from the upper half of an int4+4 cache, as `off` has.
With --context, instead of the three texts, the `long` one: the built-in text up to there, which goes on greedily.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch

from quantkit.checkpoint.locate import locate
from quantkit.checkpoint.reader import Checkpoint
from quantkit.corpus import evaluation_rows, load_tokenizer
from quantkit.runtime.engine import Engine, EngineConfig
from quantkit.runtime.paged_model import CacheOptions, PagedModel
from quantkit.runtime.proposer import Proposer
from quantkit.runtime.request import Request, SamplingParams
from quantkit.runtime.speculate import open_speculating
from quantkit.runtime.tally import SpeculationStats

#: Name -> draft length; None is auto, 0 is off.
MODES: dict[str, int | None] = {"off": 0, "fixed 4": 4, "auto": None}

TABLE = "".join(
    f"| {number} | sensor-{number % 4} | status: nominal | temperature: 21.5 C | humidity: 40% |\n" for number in range(1, 9)
)
PROSE = (
    "The lighthouse keeper had lived on the island for eleven years before the letter came. It was brought by the supply "
    "boat, between a sack of flour and a crate of lamp oil, and it was addressed in a hand that he had not seen since he "
    "was a boy. He put it on the table, made tea, and looked at it for a long time. Outside the wind had turned to the "
    "north, and the first gulls of the spring were"
)


@dataclass(frozen=True)
class Measured:
    """One mode on one text."""

    text: str
    mode: str
    rate: float
    speed_up: float
    quartiles: tuple[float, float]
    same: bool
    speculation: SpeculationStats | None

    def row(self) -> str:
        """A line of the table."""
        stats = self.speculation
        if stats is None or stats.acceptance_rate is None or stats.mean_accepted_length is None:
            cells = ["", "", ""]
        else:
            cost = "" if stats.cost_ratio is None else f"{stats.cost_ratio:.3f}"
            cells = [f"{stats.acceptance_rate:.0%}", f"{stats.mean_accepted_length:.2f}", cost]
        same = "" if self.same else "no"
        low, high = self.quartiles
        return " | ".join(
            [self.text, self.mode, f"{self.rate:.1f}", f"{self.speed_up:.2f} ({low:.2f}-{high:.2f})", *cells, same]
        )


def run(model: PagedModel, drafter: Callable[[], Proposer], mode: str, request: Request) -> tuple[float, list[int], Engine]:
    """Tokens/s, the tokens, and the engine that made them."""
    config = EngineConfig(max_batch=1, prefix_caching=False, draft_len=MODES[mode] or None)
    engine = Engine(model, config, proposer=None if mode == "off" else drafter())
    (output,) = engine.generate([request])
    first, finished = output.timing.first_token, output.timing.finished
    assert first is not None
    assert finished is not None
    return (len(output.token_ids) - 1) / (finished - first), output.token_ids, engine


def measure(model: PagedModel, drafter: Callable[[], Proposer], text: str, request: Request, repeats: int) -> list[Measured]:
    """All modes on one text; the first run of all warms up."""
    run(model, drafter, "fixed 4", request)
    runs: dict[str, list[tuple[float, list[int], Engine]]] = {mode: [] for mode in MODES}
    for repeat in range(repeats):
        for mode in list(MODES)[:: -1 if repeat % 2 else 1]:
            runs[mode].append(run(model, drafter, mode, request))
    measured = []
    for mode, found in runs.items():
        rate = statistics.median(each for each, _, _ in found)
        ratios = [each / plain for (each, _, _), (plain, _, _) in zip(found, runs["off"], strict=True)]
        low, speed_up, high = statistics.quantiles(ratios, n=4, method="inclusive")
        same = all(tokens == runs["off"][0][1] for _, tokens, _ in found)
        middle = min(found, key=lambda each: abs(each[0] - rate))
        measured.append(Measured(text, mode, rate, speed_up, (low, high), same, middle[2].stats.speculation))
    return measured


def requests(folder: Path, tokens: int, context: int | None = None) -> dict[str, Request]:
    """The three texts, or the long one."""
    encode = load_tokenizer(Checkpoint(folder))
    greedy = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    if context is not None:
        return {"long": Request(evaluation_rows("builtin", 1, context, encode)[0].tolist(), greedy)}
    hot = SamplingParams(max_tokens=tokens, temperature=1.5, top_k=10, seed=1, ignore_eos=True)
    return {
        "repetitive": Request(encode(TABLE)["input_ids"], greedy),
        "ordinary": Request(encode(PROSE)["input_ids"], greedy),
        "random": Request(encode("".join(Random(1).choices("0123456789", k=128)))["input_ids"], hot),
    }


def speculation(options: argparse.Namespace) -> str:
    """The words of `--spec`."""
    if options.draft:
        return f"draft:{options.draft}"
    return "qspec" if options.qspec else "quantspec" if options.quantspec else "ngram"


def main() -> None:
    """Print a row a mode and text, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    drafters = parser.add_mutually_exclusive_group()
    drafters.add_argument("--draft")
    drafters.add_argument("--qspec", type=int, choices=[4, 8])
    drafters.add_argument("--quantspec", action="store_true")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--context", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder, device = locate(options.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The three texts have fewer than 512 tokens.
    cache = CacheOptions(max_batch=1, max_model_len=(options.context or 512) + options.tokens)
    model, drafter = open_speculating(folder, device, cache, speculation(options), options.qspec or 8)
    assert drafter is not None
    print("text | mode | tok/s | speed-up | accepted | tokens/draft | cost | same")
    measured: list[Measured] = []
    for text, request in requests(folder, options.tokens, options.context).items():
        found = measure(model, drafter, text, request, options.repeats)
        measured += found
        print("\n".join(each.row() for each in found), flush=True)
    result = json.dumps([asdict(each) for each in measured], indent=2)
    if options.json:
        options.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()

"""Speculative decoding compared with plain decoding, on texts that suit it and texts that do not: one request per mode.

    tok/s       tokens after the first / seconds of the steps that generated them, median of the repeats
    speed-up    tok/s / tok/s of `off` in the same repeat, median of the repeats (and their quartiles)
    accepted    share of the drafted tokens that were accepted
    tokens/draft  tokens per verified draft, including the one that the model adds
    cost        seconds per draft step / seconds per verifying step

All modes generate at the same time in one process, each with a model of its own, and step in turn: the mode with the fewest
tokens is next. A machine that slows down, for a second or for a minute, slows all of them alike. Every repeat starts with
engines that have learned nothing. `same` says whether the tokens equal those of `off`, as they must.

Texts: `repetitive` continues a table and `ordinary` continues prose, both greedily. `random` continues random digits, sampled
from the ten most probable tokens, so that every pair of tokens has occurred before and does not predict the next.

usage: python -m benchmarks.speculation [--model demo] [--draft MODEL | --qspec 4|8 | --quantspec] [--tokens 128]
           [--repeats 5] [--context TOKENS] [--json FILE]

By default drafts come from prompt lookup. --draft names a draft model: any artifact with the same tokenizer. With --qspec the
model, which must be an artifact, drafts for itself with activations of 4 or 8 bits. With --quantspec it drafts from the upper
half of an int4+4 cache, which `off` uses too; `default KV` is plain decoding with the default cache, and may give other
tokens. --context replaces the three texts by `long`: that many tokens of the built-in text, continued greedily.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch

from benchmarks.machine import describe_machine
from quantkit.checkpoint.locate import locate
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.data.corpus import evaluation_rows
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner
from quantkit.runtime.speculative.metrics import SpeculationStats
from quantkit.runtime.speculative.opened_model import OpenedModel
from quantkit.runtime.speculative.proposer import Proposer
from quantkit.runtime.speculative.proposers import open_with_proposer

#: Modes with drafts -> their length; None is auto.
MODES: dict[str, int | None] = {"fixed 4": 4, "auto": None}

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


class Stream:
    """One mode's text as it grows.

    Attributes:
        engine: generates this text and nothing else.
        tokens: generated so far.
        seconds: time of the steps after the one that gave the first token.
    """

    def __init__(self, model: ModelRunner, proposer: Proposer | None, draft_len: int | None, request: Request) -> None:
        config = EngineConfig(max_batch=1, prefix_caching=False, draft_len=draft_len)
        self.engine = Engine(model, config, proposer=proposer)
        self.tokens: list[int] = []
        self.seconds = 0.0
        self.engine.add(request)
        while not self.tokens:
            self._step()

    def advance(self) -> None:
        """Run one more step."""
        started = time.perf_counter()
        self._step()
        self.seconds += time.perf_counter() - started

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return (len(self.tokens) - 1) / self.seconds

    def _step(self) -> None:
        for output in self.engine.step():
            if output.error is not None:
                raise output.error
            self.tokens += output.token_ids


def run(opened: Mapping[str, OpenedModel], request: Request) -> dict[str, Stream]:
    """Generate the text of every mode, all at the same time."""
    streams = {
        mode: Stream(model, new_proposer() if new_proposer else None, MODES.get(mode), request)
        for mode, (model, new_proposer, _) in opened.items()
    }
    waiting = list(streams.values())
    while waiting:
        # The stream with the fewest tokens; of several, the one that has waited longest.
        stream = min(waiting, key=lambda each: len(each.tokens))
        waiting.remove(stream)
        stream.advance()
        if stream.engine.has_work:
            waiting.append(stream)
    return streams


def measure(opened: Mapping[str, OpenedModel], text: str, request: Request, repeats: int) -> list[Measured]:
    """Measure all modes on one text; an extra run comes first as a warm-up."""
    run(opened, request)
    runs = [run(opened, request) for _ in range(repeats)]
    measured = []
    for mode in opened:
        rate = statistics.median(each[mode].rate for each in runs)
        low, speed_up, high = statistics.quantiles(
            (each[mode].rate / each["off"].rate for each in runs), n=4, method="inclusive"
        )
        same = all(each[mode].tokens == runs[0]["off"].tokens for each in runs)
        middle = min((each[mode] for each in runs), key=lambda stream: abs(stream.rate - rate))
        measured.append(Measured(text, mode, rate, speed_up, (low, high), same, middle.engine.stats.speculation))
    return measured


def requests(folder: Path, tokens: int, context: int | None = None) -> dict[str, Request]:
    """Name -> request: the three texts, or the long one if `context` is given."""
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


def open_modes(folder: Path, device: torch.device, cache: CacheOptions, options: argparse.Namespace) -> dict[str, OpenedModel]:
    """Mode -> a model of its own; `off` comes first."""
    words, bits = speculation(options), options.qspec or 8
    opened: dict[str, OpenedModel] = {
        "off": open_with_proposer(words, folder, device, cache, bits)._replace(new_proposer=None)
    }
    if options.quantspec:
        opened["default KV"] = open_with_proposer("off", folder, device, cache)
    return opened | {mode: open_with_proposer(words, folder, device, cache, bits) for mode in MODES}


def speculation(options: argparse.Namespace) -> str:
    """The value of `--spec`."""
    if options.draft:
        return f"draft:{options.draft}"
    return "qspec" if options.qspec else "quantspec" if options.quantspec else "ngram"


def main() -> None:
    """Print one row per mode and text, then everything as JSON."""
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
    opened = open_modes(folder, device, cache, options)
    print("text | mode | tok/s | speed-up | accepted | tokens/draft | cost | same")
    measured: list[Measured] = []
    for text, request in requests(folder, options.tokens, options.context).items():
        found = measure(opened, text, request, options.repeats)
        measured += found
        print("\n".join(each.row() for each in found), flush=True)
    result = json.dumps({"machine": describe_machine(), "texts": [asdict(each) for each in measured]}, indent=2)
    if options.json:
        options.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()

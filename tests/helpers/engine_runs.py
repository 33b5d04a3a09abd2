"""Prompts for the fake model, and helpers that run an engine to the end."""

from helpers.fake_model import VOCAB
from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine

GREEDY = SamplingParams(temperature=0, max_tokens=12)


PROMPTS = [[(7 * i + 3 * n) % VOCAB for i in range(length)] for n, length in enumerate((1, 3, 4, 5, 8, 16, 17, 30))]


def decode(ids: list[int]) -> str:
    """Every token is a letter, a to j."""
    return "".join("abcdefghij"[token % 10] for token in ids)


def drain(running: Engine) -> list[Output]:
    """Run to the end; returns all outputs. Checks the engine's integrity after every step."""
    outputs = []
    while running.has_work:
        outputs += running.step()
        running.check()
    for out in outputs:
        if out.error is not None:
            raise out.error
    assert running.stats.used_blocks == running.stats.running == running.stats.waiting == 0
    return outputs


def tokens_of(outputs: list[Output], request_id: int, index: int = 0) -> list[int]:
    """All tokens of one sample."""
    return [t for out in outputs if (out.request_id, out.index) == (request_id, index) for t in out.token_ids]


def requests(params: SamplingParams = GREEDY) -> list[Request]:
    """One request per prompt."""
    return [Request(prompt, params) for prompt in PROMPTS]

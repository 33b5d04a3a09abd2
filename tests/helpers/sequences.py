"""Sequences without an engine, with reproducible random numbers."""

from array import array
from itertools import count
from random import Random

import pytest

from quantkit.runtime.core.detokenize import TextStream
from quantkit.runtime.core.output import Timing
from quantkit.runtime.core.request import SamplingParams
from quantkit.runtime.core.sequence import Sequence
from quantkit.runtime.engine import engine


def sequence(
    prompt: list[int], output: tuple[int, ...] = (), params: SamplingParams | None = None, request_id: int = 0, index: int = 0
) -> Sequence:
    """A sequence in no queue, whose random numbers are seeded with its index."""
    return Sequence(
        request_id=request_id,
        index=index,
        params=params or SamplingParams(),
        tokens=array("q", [*prompt, *output]),
        num_prompt=len(prompt),
        limit=1000,
        stop_tokens=frozenset(),
        text=TextStream(lambda _: "", prompt, (), False),
        random=Random(index),
        timing=Timing(0.0),
    )


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences without a seed are seeded with 0, 1, 2, ..., so that a test is reproducible."""
    numbers = count()
    monkeypatch.setattr(engine, "Random", lambda: Random(next(numbers)))

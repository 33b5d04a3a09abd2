"""Sequences without an engine."""

from array import array
from random import Random

from quantkit.runtime.detokenize import TextStream
from quantkit.runtime.request import SamplingParams
from quantkit.runtime.sequence import Sequence, Timing


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

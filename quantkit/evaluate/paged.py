"""Logits of a text as the engine computes them: through the paged cache, in chunks, with eviction."""

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from random import Random

from torch import Tensor

from quantkit.runtime.detokenize import TextStream
from quantkit.runtime.eviction import Eviction
from quantkit.runtime.forward import forward
from quantkit.runtime.kv_manager import KVManager
from quantkit.runtime.model import Model
from quantkit.runtime.request import SamplingParams
from quantkit.runtime.sequence import Scheduled, Sequence, Timing


def scored_text(tokens: SequenceOf[int]) -> Sequence:
    """A sequence that is all prompt, in no queue."""
    return Sequence(
        request_id=0,
        index=0,
        params=SamplingParams(),
        tokens=array("q", tokens),
        num_prompt=len(tokens),
        limit=len(tokens) + 1,
        stop_tokens=frozenset(),
        text=TextStream(lambda _: "", tokens, (), False),
        random=Random(0),
        timing=Timing(0.0),
    )


def paged_logits(model: Model, sequence: Sequence, eviction: Eviction | None = None, *, chunk: int = 512) -> Iterator[Tensor]:
    """The logits behind every token of a text.

    Args:
        model: nobody else uses its cache meanwhile.
        sequence: a fresh `scored_text`; while the caller looks at a chunk, it tells what is held.
        eviction: what is dropped on the way; None: nothing, and KV memory must hold the text.
        chunk: tokens a forward at most.

    Yields:
        float32 [n, V] for the next n tokens.
    """
    kv = KVManager(model.num_blocks, model.block_size, prefix_caching=False, eviction=eviction)
    while sequence.num_pending:
        count = min(sequence.num_pending, chunk, kv.make_way(sequence))
        fits = kv.extend(sequence, count)
        assert fits, "KV memory does not hold the text"
        logits = forward(model, kv, [Scheduled(sequence, count, count)])
        kv.commit(sequence, count)
        yield logits

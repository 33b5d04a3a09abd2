"""Logits of a text as the engine computes them: through the paged KV cache, in chunks, with eviction."""

from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from quantkit.runtime.core.detokenize import TextStream
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.output import Timing
from quantkit.runtime.core.request import SamplingParams
from quantkit.runtime.core.sequence import Scheduled, Sequence
from quantkit.runtime.engine.forward import forward
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.kv_cache.eviction import Budget, Eviction, check_windows
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model


def scored_text(tokens: SequenceOf[int]) -> Sequence:
    """A sequence that consists of a prompt only and is in no queue."""
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
    """The logits that follow each token of a text.

    Args:
        model: nothing else may use its cache meanwhile.
        sequence: a fresh `scored_text`. While the caller handles a chunk, it tells which blocks are held.
        eviction: which blocks are evicted on the way; None: none, so KV memory must hold the whole text.
        chunk: most tokens per forward pass.

    Yields:
        float32 [n, V] for the next n tokens.
    """
    kv = BlockManager(model.num_blocks, model.block_size, prefix_caching=False, eviction=eviction)
    while sequence.num_pending:
        count = min(sequence.num_pending, chunk, kv.evict_to_budget(sequence))
        fits = kv.extend(sequence, count)
        assert fits, "KV memory does not hold the text"
        logits = forward(model, kv, [Scheduled(sequence, count, count)])
        kv.commit(sequence, count)
        yield logits


def open_bounded(folder: Path, device: torch.device, kv_dtype: str, length: int, budget: Budget) -> ModelRunner:
    """Open a model that computes windows of `length` tokens while keeping only the tokens within a KV budget.

    Raises:
        QuantkitError: the model cannot be loaded, or does not support such a cache or budget.
    """
    options = CacheOptions(max_model_len=length, max_batch=1, dtype=kv_dtype, budget=budget)
    model = open_model(folder, device, options)
    eviction = budget.eviction(model.block_size)
    assert eviction is not None
    check_windows(eviction, model.block_size, model.sliding_window)
    return model


def bounded_logits(
    model: ModelRunner, budget: Budget, tokens: Tensor, advance: Callable[[int, int], None]
) -> Callable[[int], Iterator[Tensor]]:
    """A function from window number to logits for `metrics.measure_logits`; each window is its own sequence.

    Args:
        model: from `open_bounded`.
        budget: the budget that the model was opened with.
        tokens: int64 [windows, T].
        advance: called with (windows done, windows) after each.
    """
    eviction = budget.eviction(model.block_size)

    def chunks(window: int) -> Iterator[Tensor]:
        yield from paged_logits(model, scored_text(tokens[window, :-1].tolist()), eviction)
        advance(window + 1, len(tokens))

    return chunks

"""Decode steps as CUDA graphs: one replay instead of hundreds of kernel launches.

A graph is captured for each batch size of a small set, and for each number of new tokens per sequence that occurs (1; with
speculation also draft_len + 1). Inputs are copied into static buffers. Unused sequences have length 0 and slot -1, so they
write nothing and attend to nothing. Prefill and mixed steps have data-dependent shapes and stay eager.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.cache import KVCache

#: Most new tokens per sequence in a captured step.
MAX_QUERY_LEN = 16


@dataclass(frozen=True)
class _Captured:
    graph: "torch.cuda.CUDAGraph"
    batch: Batch
    logits: Tensor


def bucket(sequences: int, max_batch: int) -> int:
    """The captured batch size for a number of sequences: the next power of two up to 16, then the next multiple of 16."""
    size = 1 << (sequences - 1).bit_length() if sequences <= 16 else -(-sequences // 16) * 16
    return min(size, max_batch)


class CudaGraphBackend:
    """Replays CUDA graphs of a model's decode steps, each captured when it is first needed; implements `Backend`."""

    name = "cuda_graphs"

    def __init__(self, run: Callable[[Batch, bool], Tensor], cache: KVCache, max_model_len: int, max_batch: int) -> None:
        """
        Args:
            run: the forward pass that is captured: `EagerBackend.forward`.
            cache: which it reads and writes.
            max_model_len: longest sequence in tokens.
            max_batch: most sequences per step.
        """
        self._run, self._cache, self._max_batch = run, cache, max_batch
        self._max_model_len = max_model_len
        self._captured: dict[tuple[int, int, bool], _Captured] = {}
        self._pool: Any = None

    def supports(self, batch: Batch) -> bool:
        """Batches in which every sequence has the same few new tokens, and all of these need logits.

        Batches in which attention is measured are not captured.
        """
        sequences, tokens, length = len(batch.seq_lens), len(batch.token_ids), batch.max_query_len
        uniform = tokens == sequences * length and length <= MAX_QUERY_LEN and sequences <= self._max_batch
        return uniform and len(batch.logit_rows) == tokens and batch.attention_mass is None

    def forward(self, batch: Batch, draft: bool) -> Tensor:
        """See `Backend`."""
        key = bucket(len(batch.seq_lens), self._max_batch), batch.max_query_len, draft
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        captured = self._captured[key]
        _fill(captured.batch, batch)
        captured.graph.replay()
        return captured.logits[: len(batch.token_ids)].clone()

    def _capture(self, sequences: int, length: int, draft: bool) -> _Captured:
        static = _padding(sequences, length, -(-self._max_model_len // self._cache.block_size), self._cache.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(static, draft)  # Warm-up: kernels are compiled and tuned outside the capture.
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._run(static, draft)
        self._pool = graph.pool()
        return _Captured(graph, static, logits)


def _padding(sequences: int, length: int, max_blocks: int, device: torch.device) -> Batch:
    """A batch of padding only."""
    tokens = sequences * length

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return Batch(
        token_ids=zeros(tokens, dtype=torch.int64),
        positions=zeros(tokens, dtype=torch.int64),
        slot_mapping=torch.full((tokens,), -1, dtype=torch.int64, device=device),
        block_table=zeros(sequences, max_blocks, dtype=torch.int32),
        query_start=torch.arange(sequences + 1, dtype=torch.int32, device=device) * length,
        seq_lens=zeros(sequences, dtype=torch.int32),
        logit_rows=torch.arange(tokens, dtype=torch.int64, device=device),
        max_query_len=length,
        max_seq_len=0,
    )


def _fill(static: Batch, batch: Batch) -> None:
    """Copy a batch into the front of a static one; the remainder becomes padding."""
    tokens, sequences = len(batch.token_ids), len(batch.seq_lens)
    static.token_ids[:tokens] = batch.token_ids
    static.positions.zero_()  # Some rotary embeddings look at the largest position.
    static.positions[:tokens] = batch.positions
    static.slot_mapping.fill_(-1)
    static.slot_mapping[:tokens] = batch.slot_mapping
    static.seq_lens.zero_()
    static.seq_lens[:sequences] = batch.seq_lens
    static.block_table[:sequences, : batch.block_table.shape[1]] = batch.block_table

"""A model that exposes every mistake of the engine: it stores tokens per slot and reads them back through the block table.

Its logits depend on all tokens of the context in order, as found in the cache. So a wrong slot, block, position or length
changes the output. `expected` computes the right output without a cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.runtime.core.batch import Batch

VOCAB = 97
_MODULUS = 2**31 - 1


def _digest(tokens: Sequence[int]) -> int:
    state = 17
    for token in tokens:
        state = (state * 48271 + token + 1) % _MODULUS
    return state


def logits_after(tokens: Sequence[int], vocab: int = VOCAB) -> Tensor:
    """float32 [V], the model's logits after a text."""
    ids = torch.arange(1, vocab + 1, dtype=torch.int64)
    return ((_digest(tokens) * ids % _MODULUS) % 8191).float() / 1024


def expected(prompt: Sequence[int], count: int, vocab: int = VOCAB) -> list[int]:
    """The `count` tokens that greedy decoding appends."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens, vocab).argmax()))
    return tokens[len(prompt) :]


class FakeModel:
    """Implements `runtime.core.model.Model`.

    Attributes:
        batches: (sequences, new tokens) of every forward pass.
        fail: forward passes whose batch contains this token raise an error.
        spoil: token -> a value that replaces one of the logits after it.
    """

    def __init__(self, num_blocks: int = 64, block_size: int = 4, max_model_len: int = 128, vocab_size: int = VOCAB) -> None:
        self.vocab_size, self.context, self.max_model_len = vocab_size, max_model_len, max_model_len
        self.block_size, self.num_blocks = block_size, num_blocks
        self.sliding_window = 0
        self.batches: list[tuple[int, int]] = []
        self.fail: int | None = None
        self.spoil: dict[int, float] = {}
        #: (position, token) in every slot.
        self._slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Model`."""
        size = self.block_size
        sources = [self._slots[source * size : (source + 1) * size] for source, _ in pairs]
        for (_, target), values in zip(pairs, sources, strict=True):
            self._slots[target * size : (target + 1) * size] = values

    def forward(self, batch: Batch) -> Tensor:
        """See `Model`."""
        if self.fail is not None and self.fail in batch.token_ids.tolist():
            raise RuntimeError("out of memory, say")
        self._check_shapes(batch)
        starts, lengths, tables = batch.query_start.tolist(), batch.seq_lens.tolist(), batch.block_table.tolist()
        slots = batch.slot_mapping.tolist()
        assert len(set(slots)) == len(slots)
        for slot, position, token in zip(slots, batch.positions.tolist(), batch.token_ids.tolist(), strict=True):
            self._slots[slot] = position, token
        rows = {}
        for start, stop, length, table in zip(starts[:-1], starts[1:], lengths, tables, strict=True):
            context = [self._read(table, position) for position in range(length)]
            assert batch.positions[start:stop].tolist() == list(range(length - (stop - start), length))
            assert slots[start:stop] == [self._slot(table, position) for position in range(length - (stop - start), length)]
            for row in range(start, stop):
                rows[row] = context[: length - (stop - 1 - row)]
        self.batches.append((len(lengths), len(slots)))
        wanted = [self._logits(rows[row]) for row in batch.logit_rows.tolist()]
        return torch.stack(wanted) if wanted else torch.empty(0, self.vocab_size)

    def _logits(self, tokens: Sequence[int]) -> Tensor:
        logits = logits_after(tokens, self.vocab_size)
        if tokens[-1] in self.spoil:
            logits[3] = self.spoil[tokens[-1]]
        return logits

    def _slot(self, table: Sequence[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _read(self, table: Sequence[int], position: int) -> int:
        found = self._slots[self._slot(table, position)]
        assert found is not None, "a slot is read that was never written"
        assert found[0] == position, f"position {found[0]} is read as {position}"
        return found[1]

    def _check_shapes(self, batch: Batch) -> None:
        tokens, sequences = len(batch.token_ids), len(batch.seq_lens)
        assert (
            batch.token_ids.dtype == batch.positions.dtype == batch.slot_mapping.dtype == batch.logit_rows.dtype == torch.int64
        )
        assert batch.block_table.dtype == batch.query_start.dtype == batch.seq_lens.dtype == torch.int32
        assert batch.positions.shape == batch.slot_mapping.shape == (tokens,)
        assert batch.query_start.shape == (sequences + 1,)
        assert batch.query_start[0] == 0
        assert batch.query_start[-1] == tokens
        assert batch.block_table.shape[0] == sequences
        # The table may be wider: blocks are reserved for a draft before its length is known.
        assert batch.block_table.shape[1] * self.block_size >= batch.max_seq_len
        assert batch.max_query_len == int(batch.query_start.diff().max())
        assert batch.max_seq_len == int(batch.seq_lens.max())
        assert int(batch.slot_mapping.min()) >= 0
        assert int(batch.slot_mapping.max()) < len(self._slots)

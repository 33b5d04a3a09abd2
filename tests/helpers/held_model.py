"""A model for tests of eviction, and its expected output: its logits depend on every token that is held, with its position.

`expected` follows the rules position by position, without blocks, batches or a cache: what `runtime.eviction` says, in
tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.fake_model import VOCAB, FakeModel, logits_after
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.eviction import Eviction

#: A token and its position.
Held = tuple[int, int]


class HeldModel(FakeModel):
    """Reads all held tokens back; positions must ascend and the new ones must be the last."""

    def forward(self, batch: Batch) -> Tensor:
        """See `Model`."""
        self._check_shapes(batch)
        starts, lengths, tables = batch.query_start.tolist(), batch.seq_lens.tolist(), batch.block_table.tolist()
        slots, tokens, positions = batch.slot_mapping.tolist(), batch.token_ids.tolist(), batch.positions.tolist()
        assert len(set(slots)) == len(slots)
        for slot, position, token in zip(slots, positions, tokens, strict=True):
            self._slots[slot] = position, token
        rows = {}
        for index, (start, stop, length) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
            held = [self._held(self._slot(tables[index], place)) for place in range(length)]
            assert [position for position, _ in held] == sorted({position for position, _ in held})
            assert [position for position, _ in held[length - (stop - start) :]] == positions[start:stop]
            for row in range(start, stop):
                rows[row] = held[: length - (stop - 1 - row)]
        self.batches.append((len(lengths), len(slots)))
        if batch.attention_mass is not None:
            for index, row, mass in zip(
                batch.attention_mass.sequences, batch.attention_mass.rows, batch.attention_mass.mass, strict=True
            ):
                assert row == starts[index + 1] - 1
                for block in range(lengths[index] // self.block_size):
                    mass[block] += mass_of(rows[int(row)], block, self.block_size)
        wanted = [logits_of(rows[row]) for row in batch.logit_rows.tolist()]
        return torch.stack(wanted) if wanted else torch.empty(0, self.vocab_size)

    def _held(self, slot: int) -> Held:
        found = self._slots[slot]
        assert found is not None, "a slot is read that was never written"
        return found


def logits_of(held: Sequence[Held]) -> Tensor:
    """Logits after the held tokens, float32 [V]."""
    return logits_after([1009 * position + token for position, token in held])


def mass_of(held: Sequence[Held], block: int, block_size: int) -> int:
    """Attention that the last of the held tokens pays to a block: a small number, so that ties occur."""
    return (held[block * block_size][1] + 3 * held[-1][1]) % 8


def visible(tokens: Sequence[int], eviction: Eviction, block_size: int) -> list[list[Held]]:
    """The positions that the token at each position sees, including its own."""
    held: list[Held] = []
    scores = [0.0] * eviction.blocks
    seen = []
    for position, token in enumerate(tokens):
        if len(held) == eviction.blocks * block_size:
            if eviction.policy.scored:
                scores = [0.5 * score + mass_of(held, block, block_size) for block, score in enumerate(scores)]
            dropped = eviction.drop(scores)
            held = [one for place, one in enumerate(held) if place // block_size not in dropped]
            scores = [score for block, score in enumerate(scores) if block not in dropped] + [0.0] * len(dropped)
        held.append((position, token))
        seen.append(held[:])
    return seen


def expected(prompt: Sequence[int], count: int, eviction: Eviction, block_size: int) -> list[int]:
    """The `count` tokens that greedy decoding appends."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(visible(tokens, eviction, block_size)[-1])[:VOCAB].argmax()))
    return tokens[len(prompt) :]

"""A step's input as tensors: all new tokens of all sequences packed one after another."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.core.sequence import Scheduled


@dataclass(frozen=True)
class Measured:
    """O sequences of a batch whose attention is wanted, that of their last token (see `kernels.attention_mass`).

    Attributes:
        sequences: int64 [O], which ones.
        rows: int64 [O], their last tokens among all of the batch.
        mass: float32 [O, B], zero; the forward adds every layer's.
    """

    sequences: Tensor
    rows: Tensor
    mass: Tensor

    def to(self, device: torch.device) -> "Measured":
        """The same on `device`; mass that is added there stays there."""
        return Measured(self.sequences.to(device), self.rows.to(device), self.mass.to(device))


class Held(NamedTuple):
    """A sequence's part of the cache: its blocks in the order of their tokens, and how many tokens before and after a step."""

    blocks: Sequence[int]
    before: int
    after: int


@dataclass(frozen=True)
class Batch:
    """T new tokens of S sequences.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], from 0 in every sequence's text. All that follows speaks of the tokens that are held.
        slot_mapping: int64 [T], block * block_size + offset at which a token's key and value are stored; -1: nowhere.
        block_table: int32 [S, B], the physical blocks in the order of their tokens. Entries behind a sequence's last block are
            0 and must not be read.
        query_start: int32 [S + 1], cumulated counts of new tokens.
        seq_lens: int32 [S], tokens in the cache once this step's are written.
        logit_rows: int64 [R], ascending: which of the T tokens need logits.
        max_query_len: most new tokens of a sequence.
        max_seq_len: most tokens of a sequence.
        measured: sequences whose attention is measured; None: of none.
        held: of each sequence, on the host; empty where nothing is to be written. True until the step has run.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    logit_rows: Tensor
    max_query_len: int
    max_seq_len: int
    measured: Measured | None = None
    held: Sequence[Held] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; itself where it is there already."""
        if self.token_ids.device == device:
            return self
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        measured = None if self.measured is None else self.measured.to(device)
        return replace(self, **moved, measured=measured)


def build_batch(scheduled: Sequence[Scheduled], block_size: int, measured: Sequence[int] = ()) -> Batch:
    """The batch of a step, on the CPU; there is at least one sequence in it. `measured` are places in `scheduled`.

    Everything is gathered in `array`s that the tensors then share: converting lists would cost more than the rest.
    """
    tokens, positions, slots, rows = array("q"), array("q"), array("q"), array("q")
    starts, lengths = array("i", [0]), array("i")
    parts: list[Held] = []
    for sequence, num_tokens, num_logits, draft, num_scored in scheduled:
        first, stop, blocks = sequence.num_computed, sequence.num_computed + num_tokens, sequence.blocks
        tokens.extend(sequence.tokens[first:stop])
        tokens.extend(draft.tokens)
        positions.extend(range(first, stop))
        held = range(sequence.num_held, sequence.num_held + num_tokens)
        slots.extend([blocks[i // block_size] * block_size + i % block_size for i in held])
        rows.extend(range(len(tokens) - num_logits - num_scored, len(tokens)))
        starts.append(len(tokens))
        lengths.append(held.stop)
        parts.append(Held(blocks, held.start, held.stop))
    table = _block_table([entry.sequence.blocks for entry in scheduled])
    return Batch(
        token_ids=torch.frombuffer(tokens, dtype=torch.int64),
        positions=torch.frombuffer(positions, dtype=torch.int64),
        slot_mapping=torch.frombuffer(slots, dtype=torch.int64),
        block_table=table,
        query_start=torch.frombuffer(starts, dtype=torch.int32),
        seq_lens=torch.frombuffer(lengths, dtype=torch.int32),
        # An empty buffer cannot be shared.
        logit_rows=torch.frombuffer(rows, dtype=torch.int64) if rows else torch.empty(0, dtype=torch.int64),
        max_query_len=max(entry.num_tokens for entry in scheduled),
        max_seq_len=max(lengths),
        measured=_measured(measured, starts, table.shape[1]) if measured else None,
        held=parts,
    )


def lone_batch(tokens: Tensor, start: int, block_size: int) -> Batch:
    """The next tokens of one sequence that owns the first blocks of a cache, on the CPU; the last one has logits.

    Args:
        tokens: int64 [T], at positions start, start + 1, ...
        start: tokens of the sequence that are in the cache.
        block_size: of the cache.
    """
    stop = start + len(tokens)
    positions, blocks = torch.arange(start, stop), range(-(-stop // block_size))
    return Batch(
        token_ids=tokens,
        positions=positions,
        slot_mapping=positions,
        block_table=torch.tensor([list(blocks)], dtype=torch.int32),
        query_start=torch.tensor([0, len(tokens)], dtype=torch.int32),
        seq_lens=torch.tensor([stop], dtype=torch.int32),
        logit_rows=torch.tensor([len(tokens) - 1]),
        max_query_len=len(tokens),
        max_seq_len=stop,
        held=[Held(blocks, start, stop)],
    )


def _measured(places: Sequence[int], starts: "array[int]", width: int) -> Measured:
    rows = [starts[place + 1] - 1 for place in places]
    return Measured(torch.tensor(places), torch.tensor(rows), torch.zeros(len(places), width))


def _block_table(tables: "list[array[int]]") -> Tensor:
    """Rows of equal length, filled up with block 0."""
    width = max(map(len, tables)) * array("i").itemsize
    joined = bytearray().join([table.tobytes().ljust(width, b"\0") for table in tables])
    return torch.frombuffer(joined, dtype=torch.int32).view(len(tables), -1)

"""A step's input as tensors: all new tokens of all sequences packed one after another."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.runtime.sequence import Scheduled


@dataclass(frozen=True)
class Batch:
    """T new tokens of S sequences.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], from 0 in every sequence.
        slot_mapping: int64 [T], block * block_size + offset at which a token's key and value are stored; -1: nowhere.
        block_table: int32 [S, B], the physical block of each logical block. Entries behind a sequence's last block are 0
            and must not be read.
        query_start: int32 [S + 1], cumulated counts of new tokens.
        seq_lens: int32 [S], tokens in the cache once this step's are written.
        logit_rows: int64 [R], ascending: which of the T tokens need logits.
        max_query_len: most new tokens of a sequence.
        max_seq_len: most tokens of a sequence.
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

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**moved, max_query_len=self.max_query_len, max_seq_len=self.max_seq_len)


def build_batch(scheduled: Sequence[Scheduled], block_size: int) -> Batch:
    """The batch of a step, on the CPU; there is at least one sequence in it.

    Everything is gathered in `array`s that the tensors then share: converting lists would cost more than the rest.
    """
    tokens, positions, slots, rows = array("q"), array("q"), array("q"), array("q")
    starts, lengths = array("i", [0]), array("i")
    for sequence, num_tokens, num_logits, draft in scheduled:
        first, stop, blocks = sequence.num_computed, sequence.num_computed + num_tokens, sequence.blocks
        tokens.extend(sequence.tokens[first:stop])
        tokens.extend(draft.tokens)
        positions.extend(range(first, stop))
        slots.extend([blocks[p // block_size] * block_size + p % block_size for p in range(first, stop)])
        rows.extend(range(len(tokens) - num_logits, len(tokens)))
        starts.append(len(tokens))
        lengths.append(stop)
    return Batch(
        token_ids=torch.frombuffer(tokens, dtype=torch.int64),
        positions=torch.frombuffer(positions, dtype=torch.int64),
        slot_mapping=torch.frombuffer(slots, dtype=torch.int64),
        block_table=_block_table([entry.sequence.blocks for entry in scheduled]),
        query_start=torch.frombuffer(starts, dtype=torch.int32),
        seq_lens=torch.frombuffer(lengths, dtype=torch.int32),
        # An empty buffer cannot be shared.
        logit_rows=torch.frombuffer(rows, dtype=torch.int64) if rows else torch.empty(0, dtype=torch.int64),
        max_query_len=max(entry.num_tokens for entry in scheduled),
        max_seq_len=max(lengths),
    )


def _block_table(tables: "list[array[int]]") -> Tensor:
    """Rows of equal length, filled up with block 0."""
    width = max(map(len, tables)) * array("i").itemsize
    joined = bytearray().join([table.tobytes().ljust(width, b"\0") for table in tables])
    return torch.frombuffer(joined, dtype=torch.int32).view(len(tables), -1)

"""A step's input as tensors: the new tokens of all sequences, packed one sequence after another."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.core.sequence import Scheduled


@dataclass(frozen=True)
class AttentionMass:
    """The attention that the last tokens of O sequences pay to each block (see `kernels.attention_mass`).

    Attributes:
        sequences: int64 [O], places of the sequences in the batch.
        rows: int64 [O], places of their last tokens among the batch's T tokens.
        mass: float32 [O, B], zero at first; every layer of the forward pass adds its attention.
    """

    sequences: Tensor
    rows: Tensor
    mass: Tensor

    def to(self, device: torch.device) -> "AttentionMass":
        """A copy on `device`. Mass that is added to the copy is not added here."""
        return AttentionMass(self.sequences.to(device), self.rows.to(device), self.mass.to(device))


class KVSpan(NamedTuple):
    """A sequence's part of the KV cache in a step.

    Attributes:
        blocks: its blocks, in the order of their tokens.
        before: tokens in them before the step.
        after: tokens in them after the step.
    """

    blocks: Sequence[int]
    before: int
    after: int


@dataclass(frozen=True)
class Batch:
    """T new tokens of S sequences.

    All attributes after `positions` count only tokens that are held in the cache, not those that were evicted.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], position of each token in its sequence's text, from 0.
        slot_mapping: int64 [T], block * block_size + offset at which a token's key and value are stored; -1: nowhere.
        block_table: int32 [S, B], the physical blocks in the order of their tokens. Entries after a sequence's last block are
            0 and must not be read.
        query_start: int32 [S + 1], cumulative counts of new tokens.
        seq_lens: int32 [S], tokens in the cache once this step's are written.
        logit_rows: int64 [R], ascending: which of the T tokens need logits.
        max_query_len: largest number of new tokens of a sequence.
        max_seq_len: largest number of tokens of a sequence.
        attention_mass: accumulator for the sequences whose attention is wanted; None if there are none.
        kv_spans: one per sequence, on the host; empty if nothing is to be written. Valid until the step has run.
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
    attention_mass: AttentionMass | None = None
    kv_spans: Sequence[KVSpan] = ()

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`; the batch itself if it is there already."""
        if self.token_ids.device == device:
            return self
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        attention_mass = None if self.attention_mass is None else self.attention_mass.to(device)
        return replace(self, **moved, attention_mass=attention_mass)


def build_batch(scheduled: Sequence[Scheduled], block_size: int, attention_of: Sequence[int] = ()) -> Batch:
    """Build a step's batch on the CPU.

    Tensors share the memory of `array`s: converting lists would cost more than all the rest.

    Args:
        scheduled: the step, at least one sequence.
        block_size: tokens per block of the cache.
        attention_of: places in `scheduled` of the sequences whose attention mass is wanted.
    """
    tokens = array("q")
    positions = array("q")
    slots = array("q")
    rows = array("q")
    starts = array("i", [0])
    lengths = array("i")
    spans: list[KVSpan] = []
    for sequence, num_tokens, num_logits, draft, num_prompt_logits in scheduled:
        blocks = sequence.blocks
        first = sequence.num_computed
        stop = first + num_tokens
        tokens.extend(sequence.tokens[first:stop])
        tokens.extend(draft.tokens)
        positions.extend(range(first, stop))
        held = range(sequence.num_held, sequence.num_held + num_tokens)
        slots.extend([blocks[i // block_size] * block_size + i % block_size for i in held])
        rows.extend(range(len(tokens) - num_logits - num_prompt_logits, len(tokens)))
        starts.append(len(tokens))
        lengths.append(held.stop)
        spans.append(KVSpan(blocks, held.start, held.stop))
    table = _block_table([entry.sequence.blocks for entry in scheduled])
    return Batch(
        token_ids=torch.frombuffer(tokens, dtype=torch.int64),
        positions=torch.frombuffer(positions, dtype=torch.int64),
        slot_mapping=torch.frombuffer(slots, dtype=torch.int64),
        block_table=table,
        query_start=torch.frombuffer(starts, dtype=torch.int32),
        seq_lens=torch.frombuffer(lengths, dtype=torch.int32),
        # `frombuffer` refuses an empty buffer.
        logit_rows=torch.frombuffer(rows, dtype=torch.int64) if rows else torch.empty(0, dtype=torch.int64),
        max_query_len=max(entry.num_tokens for entry in scheduled),
        max_seq_len=max(lengths),
        attention_mass=_zero_mass(attention_of, starts, table.shape[1]) if attention_of else None,
        kv_spans=spans,
    )


def single_sequence_batch(tokens: Tensor, start: int, block_size: int) -> Batch:
    """A batch, on the CPU, with the next tokens of one sequence that owns the first blocks of a cache. The last token has
    logits.

    Args:
        tokens: int64 [T], at positions start, start + 1, ...
        start: tokens of the sequence that are in the cache.
        block_size: tokens per block of the cache.
    """
    stop = start + len(tokens)
    positions = torch.arange(start, stop)
    blocks = range(-(-stop // block_size))
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
        kv_spans=[KVSpan(blocks, start, stop)],
    )


def _zero_mass(places: Sequence[int], starts: "array[int]", width: int) -> AttentionMass:
    rows = [starts[place + 1] - 1 for place in places]
    return AttentionMass(torch.tensor(places), torch.tensor(rows), torch.zeros(len(places), width))


def _block_table(tables: "list[array[int]]") -> Tensor:
    """int32 [S, B]: the sequences' blocks, each row padded with block 0."""
    width = max(map(len, tables)) * array("i").itemsize
    padded = bytearray().join([table.tobytes().ljust(width, b"\0") for table in tables])
    return torch.frombuffer(padded, dtype=torch.int32).view(len(tables), -1)

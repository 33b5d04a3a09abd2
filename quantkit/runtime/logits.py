"""What happens to logits before a token is drawn: log probabilities are read, then some tokens are ruled out or penalised."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.selection import largest


class History:
    """Which tokens a sequence has, as penalties need it.

    Attributes:
        ids: int64, every token of the prompt or the output once.
        counts: float32, how often it is in the output.
    """

    def __init__(self) -> None:
        self.ids, self.counts = array("q"), array("f")
        self._places: dict[int, int] = {}
        self._length = 0

    def update(self, tokens: "array[int]", num_prompt: int) -> None:
        """Add what a sequence has more than at the last call; its tokens only ever grow."""
        for i in range(self._length, len(tokens)):
            self._add(tokens[i], i >= num_prompt)
        self._length = len(tokens)

    def extended(self, tokens: Sequence[int]) -> "History":
        """A copy whose output is longer by `tokens`."""
        copy = History()
        copy.ids, copy.counts, copy._places = self.ids[:], self.counts[:], dict(self._places)
        for token in tokens:
            copy._add(token, in_output=True)
        copy._length = self._length + len(tokens)
        return copy

    def _add(self, token: int, in_output: bool) -> None:
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.counts.append(0)
        self.counts[place] += in_output


class Penalty(NamedTuple):
    """What is done to a row's earlier tokens: their positive logits are divided and negative ones multiplied by
    `repetition`; then `presence` is subtracted where a token is in the output, and `frequency` for each time it is."""

    row: int
    history: History
    repetition: float
    presence: float
    frequency: float


def penalise(logits: Tensor, penalties: Sequence[Penalty]) -> None:
    """Penalise tokens that were there before, in place.

    Repetition: Keskar et al., "CTRL" (arXiv 1909.05858), section 4.1, extended to negative logits as everywhere. Presence and
    frequency: as OpenAI's API defines them. Only the logits of tokens that were there are touched.

    Args:
        logits: float32 [R, V].
        penalties: at most one a row, with a history that is not empty.
    """
    device = logits.device
    lengths = torch.tensor([len(each.history.ids) for each in penalties])
    ids = torch.cat([torch.frombuffer(each.history.ids, dtype=torch.int64) for each in penalties]).to(device)
    counts = torch.cat([torch.frombuffer(each.history.counts, dtype=torch.float32) for each in penalties]).to(device)
    rows = torch.tensor([each.row for each in penalties]).repeat_interleave(lengths).to(device)
    strengths = torch.tensor([each[2:] for each in penalties], dtype=torch.float32).repeat_interleave(lengths, dim=0)
    repetition, presence, frequency = strengths.to(device).unbind(1)
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, ids] = values - frequency * counts - presence * (counts > 0)


def restrict(logits: Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> None:
    """Rule tokens out, in place: their logits become negative Inf.

    Args:
        logits: float32 [R, V].
        rows: the r that are restricted, at least one.
        masks: tokens that stay in each of them, one bit a token, see `Constraint.mask`.
    """
    packed = torch.frombuffer(bytearray().join(masks), dtype=torch.uint8).view(len(rows), -1).to(logits.device)
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    out = bits.flatten(1)[:, : logits.shape[1]] == 0
    if len(rows) == len(logits):
        logits.masked_fill_(out, float("-inf"))
    else:
        logits[list(rows)] = logits[list(rows)].masked_fill(out, float("-inf"))


def likeliest(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[tuple[float, list[tuple[int, float]]]]:
    """Log probabilities of the chosen tokens, and the likeliest tokens with theirs, best first.

    Args:
        logits: float32 [R, V].
        tokens: the chosen one of every row.
        counts: how many of the likeliest every row wants.
    """
    values, ids = largest(logits, max(1, *counts))
    peak = values[:, :1]
    total = peak + (logits - peak).exp_().sum(-1, keepdim=True).log_()
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]) - total
    tops = zip(ids.tolist(), (values - total).tolist(), strict=True)
    return [
        (value, list(zip(row_ids[:count], row_values[:count], strict=True)))
        for value, (row_ids, row_values), count in zip(chosen[:, 0].tolist(), tops, counts, strict=True)
    ]

"""What happens to logits before a token is drawn: log probabilities are read, then some tokens are ruled out or penalised."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.core.token_history import TokenHistory
from quantkit.runtime.sampling.top_k import largest


def find_nonfinite(peaks: Sequence[float]) -> dict[int, str]:
    """Rows of logits from which no token can be chosen, and what they are, by the largest of each (see `row_max`)."""
    # The largest of NaN and anything is NaN; it is -Inf where all are.
    names = {"nan": "NaN", "inf": "Inf", "-inf": "-Inf for every token"}
    return {row: names[str(peak)] for row, peak in enumerate(peaks) if not isfinite(peak)}


class Penalty(NamedTuple):
    """What is done to a row's earlier tokens: their positive logits are divided and negative ones multiplied by
    `repetition`; then `presence` is subtracted where a token is in the output, and `frequency` for each time it is. To the
    output belong, beside what the history knows, the tokens `ahead`."""

    row: int
    history: TokenHistory
    ahead: Sequence[int]
    repetition: float
    presence: float
    frequency: float


def penalise(logits: Tensor, penalties: Sequence[Penalty]) -> None:
    """Penalise tokens that were there before, in place.

    Repetition: Keskar et al., "CTRL" (arXiv 1909.05858), section 4.1, extended to negative logits as everywhere. Presence and
    frequency: as OpenAI's API defines them. Only the logits of tokens that were there are touched.

    Args:
        logits: float32 [R, V], contiguous.
        penalties: at most one a row, with a history that is not empty.
    """
    ids = torch.cat([torch.frombuffer(each.history.ids, dtype=torch.int64) for each in penalties])
    counts = torch.cat([torch.frombuffer(each.history.counts, dtype=torch.float32) for each in penalties])
    changed = [_penalised(logits, penalties, [len(each.history.ids) for each in penalties], ids, counts)]
    # The few tokens that are ahead are done over, rather than a history copied for each row.
    ahead = [Counter(each.ahead) for each in penalties]
    if any(ahead):
        pairs = [
            (token, each.history.count(token) + count)
            for each, new in zip(penalties, ahead, strict=True)
            for token, count in new.items()
        ]
        ids, counts = torch.tensor([token for token, _ in pairs]), torch.tensor([count for _, count in pairs])
        changed.append(_penalised(logits, penalties, [len(new) for new in ahead], ids, counts))
    for places, values in changed:
        logits.view(-1)[places] = values


def _penalised(
    logits: Tensor, penalties: Sequence[Penalty], lengths: Sequence[int], ids: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Places in all of the logits, and the new values, of so many tokens of each penalty: int64 ids, float32 counts."""
    device = logits.device
    ids, counts = ids.to(device), counts.to(device)
    which = torch.arange(len(penalties), device=device).repeat_interleave(
        torch.tensor(lengths, device=device), output_size=len(ids)
    )

    def of_each(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device)[which]

    places = of_each([each.row * logits.shape[1] for each in penalties]) + ids
    values, repetition = logits.view(-1)[places], of_each([each.repetition for each in penalties])
    values = torch.where(values > 0, values / repetition, values * repetition)
    if any(each.presence or each.frequency for each in penalties):
        values -= of_each([each.frequency for each in penalties]) * counts
        values -= of_each([each.presence for each in penalties]) * (counts > 0)
    # However small `repetition` is, logits stay numbers.
    return places, values.clamp_(max=torch.finfo(values.dtype).max)


def apply_token_mask(logits: Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> None:
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


def top_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[tuple[float, list[tuple[int, float]]]]:
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

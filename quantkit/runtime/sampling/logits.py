"""Operations on logits before a token is drawn: the check for NaN and Inf, log probabilities, token masks and penalties."""

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.core.token_history import TokenHistory
from quantkit.runtime.sampling.top_k import largest


def find_nonfinite(row_maxima: Sequence[float]) -> dict[int, str]:
    """Find the rows of logits from which no token can be chosen.

    Args:
        row_maxima: the largest logit of each row, from `row_max`: NaN if the row has a NaN, -Inf if all its logits are.

    Returns:
        Row -> what its logits are, for error messages.
    """
    names = {"nan": "NaN", "inf": "Inf", "-inf": "-Inf for every token"}
    return {row: names[str(peak)] for row, peak in enumerate(row_maxima) if not isfinite(peak)}


class Penalty(NamedTuple):
    """The penalties of one row.

    Attributes:
        row: row of the logits.
        history: the tokens of the row's sequence.
        ahead: draft tokens between the sequence and the row; they count as output.
        repetition: divides the positive and multiplies the negative logits of all earlier tokens.
        presence: then subtracted from the logits of tokens in the output.
        frequency: subtracted once per occurrence in the output.
    """

    row: int
    history: TokenHistory
    ahead: Sequence[int]
    repetition: float
    presence: float
    frequency: float


def penalise(logits: Tensor, penalties: Sequence[Penalty]) -> None:
    """Penalise the tokens that a sequence already has, in place. Logits of other tokens are not touched.

    Repetition: Keskar et al., "CTRL" (arXiv 1909.05858), section 4.1, extended to negative logits as is usual. Presence and
    frequency: as OpenAI's API defines them.

    Args:
        logits: float32 [R, V], contiguous.
        penalties: at most one per row, with a history that is not empty.
    """
    ids = torch.cat([torch.frombuffer(each.history.ids, dtype=torch.int64) for each in penalties])
    counts = torch.cat([torch.frombuffer(each.history.counts, dtype=torch.float32) for each in penalties])
    changed = [_penalised(logits, penalties, [len(each.history.ids) for each in penalties], ids, counts)]
    # The few draft tokens are computed again with their new counts: cheaper than a copy of the history per row.
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
    """Flat places in the logits, and their penalised values.

    Args:
        logits: as for `penalise`; not changed.
        penalties: as for `penalise`.
        lengths: how many of the tokens belong to each penalty.
        ids: int64, the tokens of all penalties, one penalty after another.
        counts: float32, how often each occurs in the output.
    """
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
    # Dividing by a very small `repetition` overflows; the logits must stay finite.
    return places, values.clamp_(max=torch.finfo(values.dtype).max)


def apply_token_mask(logits: Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> None:
    """Set the logits of tokens that a mask does not allow to -Inf, in place.

    Args:
        logits: float32 [R, V].
        rows: the rows to mask, at least one.
        masks: for each of these rows, one bit per token, 1 if it is allowed; see `Constraint.mask`.
    """
    packed = torch.frombuffer(bytearray().join(masks), dtype=torch.uint8).view(len(rows), -1).to(logits.device)
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    out = bits.flatten(1)[:, : logits.shape[1]] == 0
    if len(rows) == len(logits):
        logits.masked_fill_(out, float("-inf"))
    else:
        logits[list(rows)] = logits[list(rows)].masked_fill(out, float("-inf"))


def top_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row, the log probability of the chosen token, and the most likely tokens with theirs, best first.

    Args:
        logits: float32 [R, V].
        tokens: the chosen token of each row.
        counts: how many of the most likely tokens each row wants.
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

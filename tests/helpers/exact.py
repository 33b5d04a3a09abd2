"""Sampling distributions by their definitions, in float64, one row at a time; and a chi-square test of draws against them."""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.runtime.core.request import SamplingParams

#: What is drawn.
Outcome = TypeVar("Outcome", bound=Hashable)


def kept(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The kept ids in falling order of probability, equal ones by id, and their float64 probabilities after all filters."""
    probabilities = torch.softmax(logits.double() / params.temperature, -1)
    values, ids = probabilities.sort(descending=True, stable=True)
    if params.top_k:
        values, ids = values[: params.top_k], ids[: params.top_k]
    values = values / values.sum()
    before = values.cumsum(0) - values
    keep = before < params.top_p if params.top_p < 1 else torch.ones_like(values, dtype=torch.bool)
    values, ids = values[keep], ids[keep]
    keep = values >= params.min_p * values[0]
    return ids[keep], values[keep] / values[keep].sum()


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities after all filters, float64 [V], of logits [V] after penalties."""
    ids, values = kept(logits, params)
    return torch.zeros(len(logits), dtype=torch.float64).scatter(0, ids, values)


def chi_square(counts: Counter[Outcome], wanted: Mapping[Outcome, float]) -> tuple[float, float]:
    """Pearson's statistic of draws against probabilities, and the bound that 1 of 10,000 correct runs exceeds.

    Outcomes that are expected fewer than 5 times are counted together; impossible outcomes must not occur. The bound is the
    Wilson-Hilferty approximation of the quantile; 3.72 is the quantile of the normal distribution.
    """
    total = sum(counts.values())
    assert set(counts) <= {each for each, probability in wanted.items() if probability > 0}
    rare = [each for each, probability in wanted.items() if probability * total < 5]
    cells = [(counts[each], probability * total) for each, probability in wanted.items() if each not in set(rare)]
    together = sum(counts[each] for each in rare), sum(wanted[each] for each in rare) * total
    if together[1] >= 1:
        cells.append(together)
    freedom = len(cells) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return sum((found - expected) ** 2 / expected for found, expected in cells), bound

"""Drafts by a model, one token after another, for all sequences at a time."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from quantkit.runtime.logits import flaws
from quantkit.runtime.sampler import apply_constraints, apply_penalties, distribution, invert
from quantkit.runtime.selection import argmax
from quantkit.runtime.sequence import Draft, Sequence

#: Computes the newest token of some drafts, each given in full: logits behind it, float32 [S, V], which may be changed.
Extend = Callable[[SequenceOf[tuple[Sequence, list[int]]]], Tensor]


@torch.inference_mode()
def draft(lengths: Mapping[Sequence, int], logits: Tensor, extend: Extend) -> dict[Sequence, Draft]:
    """Draft as each sequence samples: the likeliest tokens for a greedy one, drawn ones and their distributions for others.

    A draft ends early where the drafter's logits are NaN or Inf: only the model's own can fail a request.

    Args:
        lengths: tokens of each draft, at least 1.
        logits: float32 [S, V], behind the sequences in this order; changed.
        extend: called while a draft is not complete.
    """
    tokens: dict[Sequence, list[int]] = {sequence: [] for sequence in lengths}
    drawn: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in lengths}
    left = list(lengths)
    while True:
        if flawed := flaws(logits):
            sound = [row for row in range(len(left)) if row not in flawed]
            logits, left = logits[sound], [left[row] for row in sound]
        _choose(logits, left, tokens, drawn)
        left = [sequence for sequence in left if len(tokens[sequence]) < lengths[sequence]]
        if not left:
            break
        logits = extend([(sequence, tokens[sequence]) for sequence in left])
    return {each: Draft(tokens[each], torch.stack(drawn[each]) if drawn[each] else None) for each in lengths}


def _choose(
    logits: Tensor, sequences: SequenceOf[Sequence], tokens: dict[Sequence, list[int]], drawn: dict[Sequence, list[Tensor]]
) -> None:
    """Append the next token of every draft, and what it was drawn from where it was drawn."""
    ahead = [tokens[sequence] for sequence in sequences]
    apply_constraints(logits, sequences, ahead)
    apply_penalties(logits, sequences, ahead)
    drawing = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    chosen = argmax(logits).tolist() if len(drawing) < len(sequences) else [0] * len(sequences)
    if drawing:
        found = distribution(logits[drawing], [sequences[row].params for row in drawing])
        for row, probabilities in zip(drawing, found, strict=True):
            chosen[row] = invert(probabilities, sequences[row].random.random())
            drawn[sequences[row]].append(probabilities)
    for sequence, token in zip(sequences, chosen, strict=True):
        tokens[sequence].append(token)

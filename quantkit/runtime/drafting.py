"""The next token of drafts that a model makes: what the sequence itself would sample from that model's logits."""

from collections.abc import Sequence as SequenceOf

from torch import Tensor

from quantkit.runtime.sampler import apply_penalties, check_finite, distribution, invert
from quantkit.runtime.selection import argmax
from quantkit.runtime.sequence import Sequence


def choose(
    logits: Tensor, sequences: SequenceOf[Sequence], tokens: dict[Sequence, list[int]], drawn: dict[Sequence, list[Tensor]]
) -> None:
    """Append the next token of every draft, and what it was drawn from where it was drawn.

    Args:
        logits: float32 [S, V], behind each sequence and its draft; changed by penalties.
        sequences: the S sequences.
        tokens: drafted so far, one more afterwards.
        drawn: of those sequences that are not greedy, float32 [V] for each drafted token.

    Raises:
        NumericsError: see `check_finite`.
    """
    check_finite(logits)
    apply_penalties(logits, sequences, [tokens[sequence] for sequence in sequences])
    for sequence, token in zip(sequences, argmax(logits).tolist(), strict=True):
        tokens[sequence].append(token)
    drawing = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if drawing:
        found = distribution(logits[drawing], [sequences[row].params for row in drawing])
        for row, probabilities in zip(drawing, found, strict=True):
            sequence = sequences[row]
            tokens[sequence][-1] = invert(probabilities, sequence.random.random())
            drawn[sequence].append(probabilities)

"""Proposers that are right, wrong, or alternate, and that record what they are told."""

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from helpers.fake_model import VOCAB, logits_after
from quantkit.runtime.core.sequence import Draft
from quantkit.runtime.core.sequence import Sequence as Text


def right(tokens: Sequence[int], _random: Random) -> int:
    """The fake model's most probable token."""
    return int(logits_after(tokens).argmax())


def wrong(tokens: Sequence[int], random: Random) -> int:
    """Another token."""
    return (right(tokens, random) + 1) % VOCAB


def mixed(tokens: Sequence[int], random: Random) -> int:
    """Right three times out of four."""
    return right(tokens, random) if random.random() < 0.75 else random.randrange(VOCAB)


def wrong_then_right(tokens: Sequence[int], random: Random) -> int:
    """Alternately wrong and right, by the length of the text."""
    return (wrong, right)[len(tokens) % 2](tokens, random)


class Guesser:
    """Drafts by a rule, with lengths that it chooses itself; checks that it is called as the protocol says.

    Attributes:
        drafted, accepted: tokens in all.
    """

    def __init__(self, guess: Callable[[Sequence[int], Random], int], *, whole: bool = True) -> None:
        self._guess, self._whole, self._random = guess, whole, Random(0)
        self._open: dict[Text, list[int]] = {}
        self.drafted = self.accepted_tokens = 0

    def propose(self, wanted: Sequence[tuple[Text, int]]) -> list[Draft]:
        """See `Proposer`."""
        self._open.clear()  # for example drafts of a step that failed
        return [self._draft(text, count) for text, count in wanted]

    def _draft(self, text: Text, count: int) -> Draft:
        assert count >= 1
        assert text.num_pending == 1
        tokens = list(text.tokens)
        for _ in range(count if self._whole else self._random.randint(0, count)):
            tokens.append(self._guess(tokens, self._random))
        self._open[text] = tokens[len(text.tokens) :]
        self.drafted += len(self._open[text])
        return Draft(self._open[text])

    def accepted(self, sequence: Text, count: int) -> None:
        """See `Proposer`."""
        draft = self._open.pop(sequence)
        assert draft
        end = sequence.num_computed
        assert sequence.tokens[end - count : end].tolist() == draft[:count]
        self.accepted_tokens += count

    def backlog(self, sequence: Text) -> int:
        """See `Proposer`."""
        return 0

    def released(self, sequence: Text) -> None:
        """See `Proposer`."""
        assert not sequence.blocks


class Drawer:
    """Draws each token from a distribution of its own that has little to do with the model's; implements `Proposer`."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def distribution(self, tokens: Sequence[int]) -> Tensor:
        """float32 [V]."""
        mixed = logits_after([7, *tokens], self._vocab) + logits_after(tokens, self._vocab)
        return torch.softmax(mixed / 6, -1)

    def propose(self, wanted: Sequence[tuple[Text, int]]) -> list[Draft]:
        """See `Proposer`."""
        return [self.draft(text, count) for text, count in wanted]

    def draft(self, text: Text, count: int) -> Draft:
        """`count` tokens, and the distributions that they were drawn from."""
        tokens, rows = list(text.tokens), []
        for _ in range(count):
            rows.append(self.distribution(tokens))
            tokens.append(text.random.choices(range(self._vocab), rows[-1].tolist())[0])
        return Draft(tokens[len(text.tokens) :], torch.stack(rows))

    def accepted(self, sequence: Text, count: int) -> None:
        """See `Proposer`."""

    def backlog(self, sequence: Text) -> int:
        """See `Proposer`."""
        return 0

    def released(self, sequence: Text) -> None:
        """See `Proposer`."""

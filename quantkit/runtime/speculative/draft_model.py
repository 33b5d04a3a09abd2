"""Drafts from a smaller model, with a paged KV cache and block tables of its own.

For each of the target's sequences there is a shadow: the same tokens (the very same array), other blocks. What the target
accepted is in the shadow without a word; its keys and values may be missing, from the prompt to the last token of a draft that
was accepted whole. The next round computes them first.
"""

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.runtime.core.batch import build_batch
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.sequence import Draft, Scheduled, Sequence
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.speculative.drafting import draft

#: Tokens of a sequence that are computed at a time while it catches up.
_CHUNK = 128


class DraftModel:
    """Implements `Proposer`.

    A sequence has no draft if the cache has no room for it, it is too long for the model, or holds a token that the model does
    not have, which may be where only the target's vocabulary is padded.
    """

    def __init__(self, model: Model, vocab_size: int) -> None:
        """
        Args:
            model: what drafts; its cache is used from now on.
            vocab_size: of the target. The models' logits may be padded to different widths.
        """
        self._model, self._vocab_size = model, vocab_size
        self._kv = BlockManager(model.num_blocks, model.block_size, prefix_caching=True)
        self._shadows: dict[Sequence, Sequence] = {}
        #: Tokens of each draft of this round.
        self._lengths: dict[Sequence, int] = {}

    @torch.inference_mode()
    def propose(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[Draft]:
        """See `Proposer`. What a sequence samples from is what its drafts are drawn from, as this model sees it."""
        self._lengths = {sequence: length for sequence, count in wanted if (length := self._reserve(sequence, count))}
        if not self._lengths:
            return [Draft()] * len(wanted)
        logits = self._catch_up([self._shadows[sequence] for sequence in self._lengths])
        drafts = draft(self._lengths, logits, self._extend)
        for sequence in self._lengths:
            shadow = self._shadows[sequence]
            shadow.num_computed = len(sequence.tokens)  # until the tokens are accepted
            if not drafts[sequence].tokens:
                self._kv.trim(shadow)
        return [drafts.get(sequence, Draft()) for sequence, _ in wanted]

    def accepted(self, sequence: Sequence, count: int) -> None:
        """The keys and values of the accepted tokens are there, but for the draft's last one."""
        shadow = self._shadows[sequence]
        self._kv.commit(shadow, min(count, self._lengths[sequence] - 1))
        self._kv.trim(shadow)

    def backlog(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are missing."""
        shadow = self._shadows.get(sequence)
        return len(sequence.tokens) if shadow is None else shadow.num_pending

    def released(self, sequence: Sequence) -> None:
        """Free its shadow's blocks."""
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            self._kv.release(shadow)

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self._kv.check(self._shadows.values())
        assert all(shadow.tokens is sequence.tokens for sequence, shadow in self._shadows.items())

    def _reserve(self, sequence: Sequence, count: int) -> int:
        """Blocks for what is missing and for a draft but its last token; its length, 0 where there is no room."""
        length = min(count, self._model.max_model_len - len(sequence.tokens) + 1)
        shadow = self._shadows.get(sequence)
        missing = sequence.tokens if shadow is None else shadow.tokens[shadow.num_computed :]
        if length <= 0 or max(missing, default=0) >= self._model.vocab_size:
            return 0
        if shadow is None:
            shadow = replace(sequence, forks=[], blocks=array("i"))
            self._kv.release(shadow)  # It has no blocks yet: what speaks of the target's starts anew.
            if not self._kv.admit(shadow, budget=len(shadow.tokens), reserve=0):
                return 0
            self._shadows[sequence] = shadow
        while length and not self._kv.extend(shadow, shadow.num_pending + length - 1):
            length -= 1
        return length

    def _catch_up(self, shadows: SequenceOf[Sequence]) -> Tensor:
        """Compute what is missing; logits behind the last token of each, float32 [S, V]."""
        for shadow in shadows:
            while shadow.num_pending > _CHUNK:
                self._model.forward(build_batch([Scheduled(shadow, _CHUNK, 0)], self._model.block_size))
                self._kv.commit(shadow, _CHUNK)
        logits = self._forward([Scheduled(shadow, shadow.num_pending, 1) for shadow in shadows])
        for shadow in shadows:
            self._kv.commit(shadow, shadow.num_pending)
        return logits

    def _extend(self, drafts: SequenceOf[tuple[Sequence, list[int]]]) -> Tensor:
        """Compute the newest token of each draft; logits behind it, float32 [S, V]."""
        scheduled = []
        for sequence, tokens in drafts:
            shadow = self._shadows[sequence]
            shadow.num_computed = len(shadow.tokens) + len(tokens) - 1
            scheduled.append(Scheduled(shadow, 1, 1, Draft(tokens[-1:])))
        return self._forward(scheduled)

    def _forward(self, scheduled: SequenceOf[Scheduled]) -> Tensor:
        assert not self._kv.copies, "a full block is never written again"
        logits = self._model.forward(build_batch(scheduled, self._model.block_size))[:, : self._vocab_size]
        return torch.nn.functional.pad(logits, (0, self._vocab_size - logits.shape[1]), value=float("-inf"))

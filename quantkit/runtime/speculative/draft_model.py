"""Drafts from a smaller model, which has a paged KV cache and block tables of its own.

Each sequence of the target has a shadow: it has the same tokens (the very same array) and other blocks. Tokens that the target
accepts therefore appear in the shadow by themselves. Their keys and values may be missing: those of the whole prompt at first,
and later those of the last token of a draft that was accepted entirely. The next round computes them first.
"""

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.locate import locate
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.errors import RequestError
from quantkit.runtime.core.batch import build_batch
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.sequence import Draft, Scheduled, Sequence
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.model.model_runner import open_with_draft
from quantkit.runtime.speculative.drafting import draft
from quantkit.runtime.speculative.opened_model import OpenedModel
from quantkit.runtime.speculative.proposers import SpecRequest

#: Tokens of a sequence that are computed per forward while it catches up.
_CHUNK = 128


class DraftModel:
    """Drafts with a smaller model; implements `Proposer`.

    A sequence gets no draft if the cache has no room for it, if it is too long for the model, or if it contains a token that
    the model does not have. The last can only happen where the target's vocabulary is padded.
    """

    def __init__(self, model: Model, vocab_size: int) -> None:
        """
        Args:
            model: the smaller model; its cache belongs to this proposer from now on.
            vocab_size: of the target. The logits of the two models may be padded to different widths.
        """
        self._model, self._vocab_size = model, vocab_size
        self._kv = BlockManager(model.num_blocks, model.block_size, prefix_caching=True)
        self._shadows: dict[Sequence, Sequence] = {}
        #: Tokens per draft of the current round.
        self._lengths: dict[Sequence, int] = {}

    @torch.inference_mode()
    def propose(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[Draft]:
        """See `Proposer`. Drafts are sampled as the sequence samples, from this model's distribution."""
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
        """Commit the keys and values of the accepted tokens. Those of the draft's last token were never computed."""
        shadow = self._shadows[sequence]
        self._kv.commit(shadow, min(count, self._lengths[sequence] - 1))
        self._kv.trim(shadow)

    def backlog(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are missing."""
        shadow = self._shadows.get(sequence)
        return len(sequence.tokens) if shadow is None else shadow.num_pending

    def released(self, sequence: Sequence) -> None:
        """Free the blocks of the sequence's shadow."""
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            self._kv.release(shadow)

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self._kv.check(self._shadows.values())
        assert all(shadow.tokens is sequence.tokens for sequence, shadow in self._shadows.items())

    def _reserve(self, sequence: Sequence, count: int) -> int:
        """Reserve blocks for missing tokens and a draft without its last token; returns its length, 0 if there is no room."""
        length = min(count, self._model.max_model_len - len(sequence.tokens) + 1)
        shadow = self._shadows.get(sequence)
        missing = sequence.tokens if shadow is None else shadow.tokens[shadow.num_computed :]
        if length <= 0 or max(missing, default=0) >= self._model.vocab_size:
            return 0
        if shadow is None:
            shadow = replace(sequence, forks=[], blocks=array("i"))
            self._kv.release(shadow)  # It has no blocks yet: this resets the fields that describe the target's cache.
            if not self._kv.admit(shadow, budget=len(shadow.tokens), reserve=0):
                return 0
            self._shadows[sequence] = shadow
        while length and not self._kv.extend(shadow, shadow.num_pending + length - 1):
            length -= 1
        return length

    def _catch_up(self, shadows: SequenceOf[Sequence]) -> Tensor:
        """Compute the missing tokens of each shadow; returns the logits after its last one, float32 [S, V]."""
        for shadow in shadows:
            while shadow.num_pending > _CHUNK:
                self._model.forward(build_batch([Scheduled(shadow, _CHUNK, 0)], self._model.block_size))
                self._kv.commit(shadow, _CHUNK)
        logits = self._forward([Scheduled(shadow, shadow.num_pending, 1) for shadow in shadows])
        for shadow in shadows:
            self._kv.commit(shadow, shadow.num_pending)
        return logits

    def _extend(self, drafts: SequenceOf[tuple[Sequence, list[int]]]) -> Tensor:
        """Compute the newest token of each draft; returns the logits after it, float32 [S, V]."""
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


def open_draft_model(request: SpecRequest) -> OpenedModel:
    """Load a model and the smaller one that `request.argument` names: a folder, a Hub id or "demo".

    Raises:
        RequestError: the two models have different tokenizers.
        QuantkitError: a model cannot be loaded, or the memory is too small.
    """
    folder = locate(request.argument)
    _check_tokenizers(request.folder, folder, request.spec)
    model, drafter = open_with_draft(request.folder, folder, request.device, request.cache)
    return OpenedModel(model, lambda: DraftModel(drafter, model.vocab_size), drafter.cache)


def _check_tokenizers(folder: Path, draft: Path, spec: str) -> None:
    """
    Raises:
        RequestError: the same text gives different tokens in the two models.
    """
    ours, theirs = (load_tokenizer(Checkpoint(each)).get_vocab() for each in (folder, draft))
    if ours != theirs:
        counts = f"{len(theirs):,} tokens, the model's {len(ours):,}" if len(ours) != len(theirs) else "other tokens"
        raise RequestError(f"--spec {spec}: its tokenizer has {counts}; draft with a model of the same family")

"""Drafts in a step: how many tokens each sequence drafts, in which blocks, and how many of them were accepted.

Drafts take what remains of the step's token budget and of the free blocks. No sequence is preempted and no prompt waits for a
draft: drafts are shortened instead. After the step every block that a draft did not fill is free again.
"""

from collections.abc import Sequence as SequenceOf

from quantkit.runtime.core.sequence import Draft, Sample, Scheduled, Sequence
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.speculative.adaptive_length import AdaptiveLength, DraftedStep
from quantkit.runtime.speculative.cost_model import ORDINARY_BACKLOG
from quantkit.runtime.speculative.metrics import SpecMetrics, SpeculationStats
from quantkit.runtime.speculative.proposer import Proposer


class DraftController:
    """Runs a proposer within the steps of an engine."""

    def __init__(self, proposer: Proposer | None, draft_len: int | None, kv: BlockManager, token_budget: int) -> None:
        """
        Args:
            proposer: proposes drafts; None: there are none.
            draft_len: most tokens per draft; None adapts the length to what pays.
            kv: the target's blocks.
            token_budget: most new tokens per step.
        """
        self._proposer, self._draft_len, self._kv, self._token_budget = proposer, draft_len, kv, token_budget
        self._adaptive = AdaptiveLength() if draft_len is None else None
        #: Of the current step: the sequences that decode, their drafts that are not empty, and the tokens beyond the ordinary
        #: that the proposer caught up on for these.
        self._decoding: list[Sequence] = []
        self._drafts: dict[Sequence, Draft] = {}
        self._backlog = 0
        self._metrics = SpecMetrics()

    @property
    def stats(self) -> SpeculationStats | None:
        """Statistics of the drafts so far; None without a proposer."""
        return None if self._proposer is None else self._metrics.stats()

    def reserve(self, scheduled: SequenceOf[Scheduled]) -> dict[Sequence, int]:
        """Reserve blocks for the drafts of sequences that decode; returns how many tokens each may draft."""
        if self._proposer is None:
            return {}
        self._drafts, self._backlog = {}, 0
        self._decoding = [entry.sequence for entry in scheduled if entry.sequence.is_decoding]
        wanted = {sequence: length for sequence in self._decoding if (length := self._wanted(sequence))}
        lengths: dict[Sequence, int] = {}
        spare = self._token_budget - sum(entry.num_tokens for entry in scheduled) if wanted else 0
        for sequence, length in wanted.items():
            # A step adds one token to those it accepts, so the last token before the limit needs no draft.
            most = min(spare, sequence.limit - len(sequence.tokens) - 1, self._kv.capacity - sequence.num_held - 1)
            length = min(length, most)
            while length > 0 and not self._kv.extend(sequence, 1 + length):
                length -= 1
            if length > 0:
                lengths[sequence] = length
                spare -= length
                self._backlog += max(self._proposer.backlog(sequence) - ORDINARY_BACKLOG, 0)
        return lengths

    def propose(self, scheduled: list[Scheduled], lengths: dict[Sequence, int]) -> list[Scheduled]:
        """Propose drafts of at most these lengths; returns the step with the drafts added."""
        if self._proposer is None or not lengths:
            return scheduled
        proposed = zip(lengths, self._proposer.propose(list(lengths.items())), strict=True)
        self._drafts = {sequence: draft for sequence, draft in proposed if draft.tokens}
        assert all(len(draft.tokens) <= lengths[sequence] for sequence, draft in self._drafts.items()), "a draft is too long"
        for sequence in lengths:
            self._kv.trim(sequence, 1 + len(self._drafts.get(sequence, Draft()).tokens))
        return [_with_draft(entry, self._drafts.get(entry.sequence, Draft())) for entry in scheduled]

    def record_step(
        self,
        scheduled: SequenceOf[Scheduled],
        chosen: SequenceOf[tuple[Sequence, list[Sample]]],
        draft_seconds: float,
        seconds: float,
    ) -> None:
        """Record the outcome of a step.

        Args:
            scheduled: the step.
            chosen: the sequences that need a next token, and the tokens that follow each.
            draft_seconds: time of proposing.
            seconds: time of the forward and the verification.
        """
        if self._proposer is None:
            return
        if not self._drafts and len(self._decoding) >= len(scheduled):
            # Where drafts do not pay, most steps are like this one, and any work done here would slow down generation.
            plain = None if self._adaptive is None else self._adaptive.record_plain_step(self._decoding, seconds)
            self._metrics.plain(draft_seconds, seconds, plain)
            return
        pure = len(self._decoding) == len(scheduled)
        drafted = {sequence: len(draft.tokens) for sequence, draft in self._drafts.items()}
        following = dict(chosen)
        outcomes = {each: (drafted.get(each, 0), len(following[each]) - 1) for each in self._decoding if each in following}
        longest = max(drafted.values(), default=0)
        self._metrics.time(longest, draft_seconds, seconds, pure=pure and not self._backlog)
        for count, accepted in outcomes.values():
            self._metrics.count(count, accepted)
        if self._adaptive is None:
            return
        plain = self._adaptive.costs.step(len(outcomes)) if pure and outcomes else None
        if plain is not None:
            tokens = sum(1 + accepted for _, accepted in outcomes.values())
            self._metrics.compare(draft_seconds + seconds, plain * tokens / len(outcomes))
        if outcomes:
            self._adaptive.record(DraftedStep(outcomes, self._backlog, draft_seconds, seconds if pure else None))
        if not pure and not longest:
            self._adaptive.costs.record_prompt(sum(entry.num_tokens for entry in scheduled), seconds)

    def commit_accepted(self, sequence: Sequence, accepted: int) -> None:
        """Commit the first `accepted` tokens of a sequence's draft, if it had one, and free the blocks of the others."""
        if sequence not in self._drafts:
            return
        self._kv.commit(sequence, accepted)
        self._kv.trim(sequence)
        assert self._proposer is not None
        self._proposer.accepted(sequence, accepted)

    def released(self, sequence: Sequence) -> None:
        """Forget a sequence that lost its blocks."""
        if self._proposer is not None:
            self._proposer.released(sequence)
        if self._adaptive is not None:
            self._adaptive.released(sequence)

    def _wanted(self, sequence: Sequence) -> int:
        if self._adaptive is None:
            assert self._draft_len is not None
            return self._draft_len
        assert self._proposer is not None
        return self._adaptive.length(sequence, len(self._decoding), self._proposer.backlog(sequence))


def _with_draft(entry: Scheduled, draft: Draft) -> Scheduled:
    count = len(draft.tokens)
    return entry._replace(num_tokens=entry.num_tokens + count, num_logits=entry.num_logits + count, draft=draft)

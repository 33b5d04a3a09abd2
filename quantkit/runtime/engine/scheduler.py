"""The schedule phase of a step: which sequences run, and how many tokens of each.

Sequences are ordered by arrival; running ones are always older than waiting ones. Every running sequence gets its next
token. The rest of the step's token budget goes to prompts, oldest first and a chunk at a time, and then to waiting sequences,
as long as there are free batch slots and blocks. When blocks run out, the youngest running sequence is preempted: it gives
back all its blocks and waits again, first in line, and its tokens are computed again later. A sequence that needs a block and
is itself the youngest keeps its blocks and skips the step.

No sequence starves: the oldest one can take the blocks of all others, and alone it fits (that is checked when its request
arrives). So it advances in every step until it ends, and then the next one is the oldest.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from operator import attrgetter

from quantkit.runtime.core.sequence import Scheduled, Sequence, Status
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.kv_cache.eviction import UNBOUNDED


class Scheduler:
    """The queues of running and waiting sequences.

    Attributes:
        running: sequences with blocks, oldest first. Only the last one may still have a prompt to compute, unless eviction
            limits the chunks of prompts.
        waiting: sequences without blocks, oldest first.
        preemptions: counter.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and those found (counters).
    """

    def __init__(self, kv: BlockManager, max_batch: int, token_budget: int, on_release: Callable[[Sequence], None]) -> None:
        """
        Args:
            kv: owns the blocks.
            max_batch: largest number of running sequences.
            token_budget: largest number of new tokens per step, at least `max_batch`.
            on_release: called with every sequence that loses its blocks, because it was preempted or has ended.
        """
        assert 1 <= max_batch <= token_budget
        self._kv = kv
        self._max_batch = max_batch
        self._token_budget = token_budget
        self._on_release = on_release
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, which is younger than all others."""
        sequence.status = Status.WAITING
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's sequences and reserve blocks for their tokens. Empty only when no sequence is left."""
        scheduled: list[Scheduled] = []
        spare = self._token_budget - len(self.running)
        while len(scheduled) < len(self.running):
            sequence = self.running[len(scheduled)]
            num_tokens = min(sequence.num_pending, 1 + spare, self._kv.evict_to_budget(sequence))
            if not self._make_room(sequence, num_tokens):
                return scheduled
            scheduled.append(_scheduled(sequence, num_tokens))
            spare -= num_tokens - 1
        scheduled.extend(self._admit(spare))
        return scheduled

    def fork(self, parent: Sequence) -> list[Sequence]:
        """Start the other samples of a request once `parent` has computed the prompt; they share its blocks.

        Returns:
            The samples that started.
        """
        children, parent.forks = parent.forks, []
        for child in children:
            self._kv.fork(parent, child)
            child.status, child.num_cached, child.timing = Status.RUNNING, parent.num_cached, parent.timing
            child.next_prompt_logprob, child.prompt_logprobs = parent.next_prompt_logprob, parent.prompt_logprobs
            insort(self.running, child, key=attrgetter("order"))
        return children

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from its queue and free its blocks."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self._kv.release(sequence)
        self._on_release(sequence)

    def check(self) -> None:
        """Assert the invariants of the queues and of the blocks."""
        everyone = [*self.running, *self.waiting]
        assert everyone == sorted(everyone, key=attrgetter("order")), "a younger sequence is before an older one"
        assert sum(sequence.num_slots for sequence in self.running) <= self._max_batch
        assert all(sequence.status is Status.RUNNING and sequence.num_pending > 0 for sequence in self.running)
        if self._kv.capacity == UNBOUNDED:
            assert all(sequence.num_pending == 1 for sequence in self.running[:-1]), "two prompts are partly computed"
        assert all(sequence.status is Status.WAITING and not sequence.blocks for sequence in self.waiting)
        self._kv.check(everyone)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Reserve blocks for a running sequence, preempting younger ones if needed; returns whether it got them."""
        while not self._kv.extend(sequence, num_tokens):
            if self.running[-1] is sequence:
                return False
            youngest = self.running.pop()
            self._kv.release(youngest)
            youngest.status = Status.WAITING
            self._on_release(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
        return True

    def _admit(self, spare: int) -> Iterator[Scheduled]:
        """Start waiting sequences, each with a chunk of its tokens, as long as one free block per running one remains."""
        slots = sum(sequence.num_slots for sequence in self.running)
        while self.waiting and spare > 0 and slots + self.waiting[0].num_slots <= self._max_batch:
            sequence = self.waiting[0]
            num_tokens = self._kv.admit(sequence, spare, reserve=slots)
            if num_tokens == 0:
                return
            self.running.append(self.waiting.popleft())
            sequence.status = Status.RUNNING
            self._note_start(sequence)
            slots += sequence.num_slots
            spare -= num_tokens
            yield _scheduled(sequence, num_tokens)

    def _note_start(self, sequence: Sequence) -> None:
        """Record when a sequence first ran and how much of its prompt was cached.

        After preemption it finds its own blocks; those do not count as prefix-cache hits.
        """
        if sequence.num_cached is None:
            sequence.timing = sequence.timing._replace(scheduled=time.monotonic())
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_cached


def _scheduled(sequence: Sequence, num_tokens: int) -> Scheduled:
    """A sequence's part in a step, without a draft."""
    # The logits after a prompt token give the log probability of the next prompt token.
    num_prompt_logits = min(sequence.num_computed + num_tokens, sequence.num_prompt - 1) - (sequence.next_prompt_logprob - 1)
    # Only a part that reaches the end of the known tokens is followed by a new one.
    num_logits = int(num_tokens == sequence.num_pending)
    return Scheduled(sequence, num_tokens, num_logits, num_prompt_logits=max(num_prompt_logits, 0))

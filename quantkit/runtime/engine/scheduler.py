"""Which sequences run in a step, and how many tokens of each.

Sequences are ordered by arrival; those that run are always older than those that wait. Every running one gets its next token;
what is left of the step's token budget goes to prompts, oldest first, a chunk at a time, and then to waiting sequences while
batch slots and blocks last. When blocks run out, the youngest running sequence gives all of its blocks back and waits
again, first in line; its tokens are computed anew later. One that finds no younger than itself keeps what it has and sits
the step out.

Nobody starves: the oldest sequence gets its blocks from all others if need be, and alone it fits (checked when a request
arrives), so it advances in every step until it ends, and then the next one is the oldest.
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
    """The two queues.

    Attributes:
        running: sequences with blocks, oldest first; only the last one may still have a prompt to compute, unless eviction
            bounds the chunks of prompts.
        waiting: sequences without blocks, oldest first; the first was preempted or comes next.
        preemptions, prefix_queries, prefix_hits: counts since the start; the latter two of prompt tokens.
    """

    def __init__(self, kv: BlockManager, max_batch: int, token_budget: int, released: Callable[[Sequence], None]) -> None:
        """
        Args:
            kv: the blocks.
            max_batch: running sequences at most.
            token_budget: new tokens in a step at most, no fewer than `max_batch`.
            released: told of every sequence that loses its blocks, because it waits again or is finished.
        """
        assert 1 <= max_batch <= token_budget
        self._kv, self._max_batch, self._token_budget, self._released = kv, max_batch, token_budget, released
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = self.prefix_queries = self.prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait. It is younger than all others."""
        sequence.status = Status.WAITING
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step; empty only when there is no sequence left. Its sequences have room for their tokens."""
        scheduled: list[Scheduled] = []
        spare = self._token_budget - len(self.running)
        while len(scheduled) < len(self.running):
            sequence = self.running[len(scheduled)]
            num_tokens = min(sequence.num_pending, 1 + spare, self._kv.evict_to_budget(sequence))
            if not self._make_room(sequence, num_tokens):
                return scheduled
            scheduled.append(_part(sequence, num_tokens))
            spare -= num_tokens - 1
        scheduled.extend(self._admit(spare))
        return scheduled

    def fork(self, parent: Sequence) -> list[Sequence]:
        """Let the other samples of a request, whose prompt `parent` has computed, run beside it on the same blocks."""
        children, parent.forks = parent.forks, []
        for child in children:
            self._kv.fork(parent, child)
            child.status, child.num_cached, child.timing = Status.RUNNING, parent.num_cached, parent.timing
            child.next_prompt_logprob, child.prompt_logprobs = parent.next_prompt_logprob, parent.prompt_logprobs
            insort(self.running, child, key=attrgetter("order"))
        return children

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        self._kv.release(sequence)
        self._released(sequence)

    def check(self) -> None:
        """Assert the invariants of the queues and of all blocks."""
        everyone = [*self.running, *self.waiting]
        assert everyone == sorted(everyone, key=attrgetter("order")), "a younger sequence is before an older one"
        assert sum(sequence.num_slots for sequence in self.running) <= self._max_batch
        assert all(sequence.status is Status.RUNNING and sequence.num_pending > 0 for sequence in self.running)
        if self._kv.capacity == UNBOUNDED:
            assert all(sequence.num_pending == 1 for sequence in self.running[:-1]), "two prompts are half computed"
        assert all(sequence.status is Status.WAITING and not sequence.blocks for sequence in self.waiting)
        self._kv.check(everyone)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the next tokens of a running sequence, taken from younger ones if need be."""
        while not self._kv.extend(sequence, num_tokens):
            if self.running[-1] is sequence:
                return False
            youngest = self.running.pop()
            self._kv.release(youngest)
            youngest.status = Status.WAITING
            self._released(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
        return True

    def _admit(self, spare: int) -> Iterator[Scheduled]:
        """Start waiting sequences, each with a chunk of its tokens, while every running one still finds a block."""
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
            yield _part(sequence, num_tokens)

    def _note_start(self, sequence: Sequence) -> None:
        """Note when it first runs, and what the prefix cache saved: later it finds its own blocks, which is no merit."""
        if sequence.num_cached is None:
            sequence.timing = sequence.timing._replace(scheduled=time.monotonic())
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_cached


def _part(sequence: Sequence, num_tokens: int) -> Scheduled:
    """A part that ends the known tokens is followed by a new one; what is followed by a token of the prompt may score it."""
    scored = min(sequence.num_computed + num_tokens, sequence.num_prompt - 1) - (sequence.next_prompt_logprob - 1)
    return Scheduled(sequence, num_tokens, int(num_tokens == sequence.num_pending), num_prompt_logits=max(scored, 0))

"""What a step does with the model: copy blocks, draft, forward, verify."""

import time

from quantkit.runtime.batch import build_batch
from quantkit.runtime.kv_manager import KVManager
from quantkit.runtime.model import Model
from quantkit.runtime.scheduler import Scheduler
from quantkit.runtime.sequence import Draft, Sample, Scheduled, Sequence
from quantkit.runtime.speculation import Speculation
from quantkit.runtime.verify import verify


class Stepper:
    """Runs scheduled steps; with no proposer every draft is empty and every sequence gets one token."""

    def __init__(self, model: Model, kv: KVManager, scheduler: Scheduler, speculation: Speculation) -> None:
        self._model, self._kv, self._scheduler, self._speculation = model, kv, scheduler, speculation

    def run(self, scheduled: list[Scheduled]) -> list[tuple[Sequence, list[Sample]]]:
        """The sequences whose tokens are all computed, each with its next ones: of its draft what is accepted, and one more.

        Samples of a prompt that this step completes run from now on.
        """
        started = time.perf_counter()
        lengths = self._speculation.reserve(scheduled)
        copies, self._kv.copies = self._kv.copies, []
        if copies:
            self._model.copy_blocks(copies)
        scheduled = self._speculation.propose(scheduled, lengths)
        drafted = time.perf_counter()
        logits = self._model.forward(build_batch(scheduled, self._model.block_size))
        for entry in scheduled:
            self._kv.commit(entry.sequence, entry.num_tokens - len(entry.draft.tokens))
        followed, drafts, rows = self._followed(scheduled)
        if not followed:
            return []
        samples = verify(logits if len(rows) == len(logits) else logits[rows], followed, drafts)
        chosen = list(zip(followed, samples, strict=True))
        self._speculation.verified(scheduled, chosen, drafted - started, time.perf_counter() - drafted)
        return chosen

    def _followed(self, scheduled: list[Scheduled]) -> tuple[list[Sequence], list[Draft], list[int]]:
        """Sequences that get tokens, their drafts, and their rows of the logits: a prompt's serve all of its samples."""
        followed: list[Sequence] = []
        drafts: list[Draft] = []
        rows: list[int] = []
        first = 0
        for entry in scheduled:
            if entry.num_logits:
                for sequence in (entry.sequence, *self._scheduler.fork(entry.sequence)):
                    followed.append(sequence)
                    drafts.append(entry.draft)
                    rows.extend(range(first, first + entry.num_logits))
            first += entry.num_logits
        return followed, drafts, rows

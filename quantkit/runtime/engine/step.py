"""What a step does with the model: copy blocks, draft, forward, verify."""

import time
from collections.abc import Mapping
from typing import NamedTuple

from quantkit.errors import NumericsError
from quantkit.kernels.cpu.row_max import row_max
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.sequence import Draft, Sample, Scheduled, Sequence
from quantkit.runtime.engine.forward import forward
from quantkit.runtime.engine.scheduler import Scheduler
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.sampling.logits import find_nonfinite
from quantkit.runtime.sampling.prompt_logprobs import append_prompt_logprobs
from quantkit.runtime.speculative.controller import Speculation
from quantkit.runtime.speculative.rejection_sampler import verify


class Stepped(NamedTuple):
    """What came of a step.

    Attributes:
        chosen: the sequences whose tokens are all computed, each with its next ones: of its draft what is accepted, and one
            more.
        failed: requests whose logits choose no token; their computed tokens are not taken for computed.
    """

    chosen: list[tuple[Sequence, list[Sample]]]
    failed: dict[int, NumericsError]


class Stepper:
    """Runs scheduled steps; with no proposer every draft is empty and every sequence gets one token."""

    def __init__(self, model: Model, kv: BlockManager, scheduler: Scheduler, speculation: Speculation) -> None:
        self._model, self._kv, self._scheduler, self._speculation = model, kv, scheduler, speculation

    def run(self, scheduled: list[Scheduled]) -> Stepped:
        """Compute a step. Samples of a prompt that it completes run from now on."""
        started = time.perf_counter()
        lengths = self._speculation.reserve(scheduled)
        copies, self._kv.copies = self._kv.copies, []
        if copies:
            self._model.copy_blocks(copies)
        scheduled = self._speculation.propose(scheduled, lengths)
        drafted = time.perf_counter()
        logits = forward(self._model, self._kv, scheduled)
        peaks, argmax_ids = row_max(logits)
        flawed = find_nonfinite(peaks)
        failed = _failed(scheduled, flawed) if flawed else {}
        going = [entry for entry in scheduled if entry.sequence.request_id not in failed]
        for entry in going:
            self._kv.commit(entry.sequence, entry.num_tokens - len(entry.draft.tokens))
        append_prompt_logprobs(logits, scheduled, failed)
        followed, drafts, rows = self._followed(scheduled, failed, flawed)
        if not followed:
            return Stepped([], failed)
        chosen_from = logits if rows == [*range(len(logits))] else logits[rows]
        samples = verify(chosen_from, followed, drafts, [argmax_ids[row] for row in rows])
        chosen = list(zip(followed, samples, strict=True))
        self._speculation.verified(going, chosen, drafted - started, time.perf_counter() - drafted)
        return Stepped(chosen, failed)

    def _followed(
        self, scheduled: list[Scheduled], failed: Mapping[int, object], flawed: Mapping[int, str]
    ) -> tuple[list[Sequence], list[Draft], list[int]]:
        """Sequences that get tokens, their drafts, and their rows of the logits: a prompt's serve all of its samples.

        A draft counts up to where the logits are flawed: without it, they might not have come to be.
        """
        followed: list[Sequence] = []
        drafts: list[Draft] = []
        rows: list[int] = []
        first = 0
        for entry in scheduled:
            first += entry.num_prompt_logits
            if entry.num_logits and entry.sequence.request_id not in failed:
                sound = next((i for i in range(entry.num_logits) if first + i in flawed), entry.num_logits)
                for sequence in (entry.sequence, *self._scheduler.fork(entry.sequence)):
                    followed.append(sequence)
                    drafts.append(_first(entry.draft, sound - 1))
                    rows.extend(range(first, first + sound))
            first += entry.num_logits
        return followed, drafts, rows


def _failed(scheduled: list[Scheduled], flawed: Mapping[int, str]) -> dict[int, NumericsError]:
    """Requests with a sequence behind whose own tokens, not those of its draft, the logits are flawed."""
    failed = {}
    first = 0
    for entry in scheduled:
        own = range(first, first + entry.num_prompt_logits + bool(entry.num_logits))
        wrong = next((row for row in own if row in flawed), None)
        if wrong is not None:
            sequence = entry.sequence
            token = sequence.num_computed + entry.num_tokens - len(entry.draft.tokens) - (own.stop - 1 - wrong)
            where = f"request {sequence.request_id}: the model's logits behind token {token}"
            reason = f"are {flawed[wrong]}, so no token can be chosen; run its weights in a wider type"
            failed[sequence.request_id] = NumericsError(f"{where} {reason}")
        first += entry.num_prompt_logits + entry.num_logits
    return failed


def _first(draft: Draft, count: int) -> Draft:
    """The first tokens of a draft."""
    if len(draft.tokens) == count:
        return draft
    return Draft(draft.tokens[:count], None if draft.probabilities is None else draft.probabilities[:count])

"""The verify phase of a step: from the model's logits to the tokens that each sequence gets."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from quantkit.errors import NumericsError
from quantkit.kernels.cpu.row_max import row_max
from quantkit.runtime.core.sequence import Draft, Sample, Scheduled, Sequence
from quantkit.runtime.engine.scheduler import Scheduler
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.sampling.logits import find_nonfinite
from quantkit.runtime.sampling.prompt_logprobs import append_prompt_logprobs
from quantkit.runtime.speculative.rejection_sampler import verify_drafts


class Verified(NamedTuple):
    """The result of the phase.

    Attributes:
        computed: the parts of the step whose requests did not fail; their tokens are committed to the KV cache.
        chosen: the sequences whose known tokens are all computed, each with its next tokens: the accepted ones of its draft,
            and one more.
        failed: request id -> error, for requests whose logits are NaN or Inf. None of their tokens is committed.
    """

    computed: list[Scheduled]
    chosen: list[tuple[Sequence, list[Sample]]]
    failed: dict[int, NumericsError]


class _Rows(NamedTuple):
    """Which rows of the logits choose tokens, sequence after sequence.

    Attributes:
        sequences: those that get tokens.
        drafts: one per sequence.
        rows: for each sequence, one row after its newest token and one after each token of its draft.
    """

    sequences: list[Sequence]
    drafts: list[Draft]
    rows: list[int]


def verify_step(logits: Tensor, scheduled: list[Scheduled], kv: BlockManager, scheduler: Scheduler) -> Verified:
    """Commit what was computed and choose the next tokens.

    When a prompt is complete, the other samples of its request start to run and get their first token from the same row.

    Args:
        logits: float32 [R, V] from `forward`; changed.
        scheduled: the step.
        kv: owns the step's blocks.
        scheduler: runs the samples that split off.
    """
    # One pass over the logits serves two purposes: it finds NaN and Inf, and the choice of every greedy row.
    row_maxima, argmax_ids = row_max(logits)
    nonfinite = find_nonfinite(row_maxima)
    failed = _failed_requests(scheduled, nonfinite) if nonfinite else {}
    computed = [entry for entry in scheduled if entry.sequence.request_id not in failed]
    for entry in computed:
        kv.commit(entry.sequence, entry.num_tokens - len(entry.draft.tokens))
    append_prompt_logprobs(logits, scheduled, failed)
    sequences, drafts, rows = _rows_to_sample(scheduled, scheduler, failed, nonfinite)
    if not sequences:
        return Verified(computed, [], failed)
    if rows != [*range(len(logits))]:
        logits = logits[rows]
    samples = verify_drafts(logits, sequences, drafts, [argmax_ids[row] for row in rows])
    return Verified(computed, list(zip(sequences, samples, strict=True)), failed)


def _failed_requests(scheduled: list[Scheduled], nonfinite: Mapping[int, str]) -> dict[int, NumericsError]:
    """Requests whose logits after a token of their own, not of a draft, are NaN or Inf."""
    failed = {}
    first = 0
    for entry in scheduled:
        own = range(first, first + entry.num_prompt_logits + bool(entry.num_logits))
        bad = next((row for row in own if row in nonfinite), None)
        if bad is not None:
            sequence = entry.sequence
            token = sequence.num_computed + entry.num_tokens - len(entry.draft.tokens) - (own.stop - 1 - bad)
            failed[sequence.request_id] = NumericsError(
                f"request {sequence.request_id}: the model's logits after token {token} are {nonfinite[bad]}, "
                "so no token can be chosen; run its weights in a wider dtype"
            )
        first += entry.num_prompt_logits + entry.num_logits
    return failed


def _rows_to_sample(
    scheduled: list[Scheduled], scheduler: Scheduler, failed: Mapping[int, object], nonfinite: Mapping[int, str]
) -> _Rows:
    """The sequences that get tokens, with their drafts and rows of the logits; the samples of a prompt share its row.

    A draft is cut where logits become NaN or Inf: its own tokens may have caused that, so they must not fail the request.
    """
    found = _Rows([], [], [])
    first = 0
    for entry in scheduled:
        first += entry.num_prompt_logits
        if entry.num_logits and entry.sequence.request_id not in failed:
            usable = next((i for i in range(entry.num_logits) if first + i in nonfinite), entry.num_logits)
            for sequence in (entry.sequence, *scheduler.fork(entry.sequence)):
                found.sequences.append(sequence)
                found.drafts.append(_truncated(entry.draft, usable - 1))
                found.rows.extend(range(first, first + usable))
        first += entry.num_logits
    return found


def _truncated(draft: Draft, count: int) -> Draft:
    """The first `count` tokens of a draft."""
    if len(draft.tokens) == count:
        return draft
    return Draft(draft.tokens[:count], None if draft.probabilities is None else draft.probabilities[:count])

"""The engine: serves many requests with one model, by continuous batching.

`Engine.step` is the whole algorithm. The engine runs in one thread, and all its methods must be called from that thread.
"""

import time
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from random import Random

from quantkit.errors import RequestError
from quantkit.runtime.core.detokenize import Decode, TextStream
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.output import FinishReason, Output, Timing, merge_outputs
from quantkit.runtime.core.request import Request
from quantkit.runtime.core.sequence import Sample, Scheduled, Sequence
from quantkit.runtime.engine.admission import check_request, length_limit
from quantkit.runtime.engine.forward import forward
from quantkit.runtime.engine.postprocess import final_output, postprocess
from quantkit.runtime.engine.scheduler import Scheduler
from quantkit.runtime.engine.stats import EngineStats
from quantkit.runtime.engine.verify import verify_step
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.kv_cache.eviction import Eviction, check_windows
from quantkit.runtime.kv_cache.offload import KVOffload
from quantkit.runtime.speculative.controller import DraftController
from quantkit.runtime.speculative.proposer import Proposer
from quantkit.runtime.speculative.proposers import MAX_DRAFT_LEN


@dataclass(frozen=True)
class EngineConfig:
    """Limits and features of an engine.

    Attributes:
        max_batch: largest number of running sequences.
        token_budget: largest number of new tokens per step. A smaller budget cuts prompts into smaller chunks, which delay
            the tokens of other requests less.
        prefix_caching: whether full blocks are kept for later prompts that start with the same tokens.
        draft_len: draft tokens per sequence and step, if there is a proposer; None: adaptive, as many as save time, even 0.
        eviction: what a sequence drops to stay within its KV budget; None: nothing.

    Raises:
        RequestError: the token budget does not cover one token for each running sequence, or drafts are too long.
    """

    max_batch: int = 64
    token_budget: int = 512
    prefix_caching: bool = True
    draft_len: int | None = None
    eviction: Eviction | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= self.token_budget:
            found = f"max_batch is {self.max_batch} and token_budget {self.token_budget}"
            raise RequestError(f"{found}; max_batch must be at least 1 and token_budget at least max_batch")
        if self.draft_len is not None and not 1 <= self.draft_len <= MAX_DRAFT_LEN:
            raise RequestError(
                f"draft_len is {self.draft_len}, it must be between 1 and {MAX_DRAFT_LEN}; or None, which adapts it"
            )


class Engine:
    """Continuous batching over a model with a paged KV cache.

    Attributes:
        model: the model that it runs.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        *,
        decode: Decode | None = None,
        eos_token_ids: Collection[int] = (),
        offload: KVOffload | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        """
        Args:
            model: what to run; the engine owns its cache from now on.
            config: limits and features.
            decode: turns token ids into text; without it, every text is empty.
            eos_token_ids: tokens that end a sequence unless its request ignores them.
            offload: keeps known prefixes that must leave the model's cache.
            proposer: drafts tokens, so that a step can add several per sequence; without it, every step adds one.

        Raises:
            RequestError: eviction is on and would widen the model's sliding windows, or offload is on and prefix caching
                is off.
        """
        self.model = model
        self._config = config or EngineConfig()
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        eviction = self._config.eviction
        if eviction is not None:
            check_windows(eviction, model.block_size, model.sliding_window)
        if offload is not None and not self._config.prefix_caching:
            raise RequestError("--kv-offload saves cached prefixes, but prefix caching is off; leave one of them out")
        self._offload = offload
        self._kv = BlockManager(model.num_blocks, model.block_size, self._config.prefix_caching, eviction, offload)
        self._draft_controller = DraftController(proposer, self._config.draft_len, self._kv, self._config.token_budget)
        self._scheduler = Scheduler(
            self._kv, self._config.max_batch, self._config.token_budget, on_release=self._draft_controller.released
        )
        self._ids = count()
        self._steps = 0
        #: Request id -> its sequences that have not ended.
        self._live: dict[int, list[Sequence]] = {}
        #: Last outputs of requests that were cancelled since the last step.
        self._cancelled: list[Output] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do or return anything."""
        return bool(self._live or self._cancelled)

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        scheduler, pool = self._scheduler, self._kv.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            used_blocks=len(pool) - pool.num_free,
            num_blocks=len(pool),
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            evicted_blocks=self._kv.evicted,
            offload=None if self._offload is None else self._offload.stats,
            speculation=self._draft_controller.stats,
        )

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            RequestError: it can never be served; nothing was allocated.
        """
        check_request(request, self.model, self._config.max_batch, self._decode is not None, self._kv.capacity)
        request_id, timing = next(self._ids), Timing(time.monotonic())
        sequences = [self._sequence(request, request_id, index, timing) for index in range(request.params.n)]
        sequences[0].forks = sequences[1:]
        self._live[request_id] = sequences
        self._scheduler.add(sequences[0])
        return request_id

    def cancel(self, request_id: int) -> bool:
        """End a request now; the next step returns its last outputs. Returns False if no such request is live."""
        outputs = self._end_request(request_id, FinishReason.CANCELLED)
        self._cancelled.extend(outputs)
        return bool(outputs)

    def step(self) -> list[Output]:
        """Run one step: one forward pass of the model, which advances every scheduled sequence.

        1. Schedule (`scheduler`): decide which sequences run and how many tokens of each; preempt if blocks run out.
        2. Draft (`speculative.controller`): reserve blocks for drafts and let the proposer fill them.
        3. Forward (`forward`): build the batch and compute the logits.
        4. Verify (`verify_step`): commit the computed tokens to the KV cache, accept draft tokens, choose one more token.
        5. Postprocess (`postprocess`): append the tokens, turn them into text, free the sequences that ended.

        What an error costs: NaN or Inf in the logits ends only the request that they belong to. Any other exception in
        phases 2 to 4 ends all requests of this step, each with that error; other requests continue. An
        exception in phase 1 or 5 is a bug; it reaches the caller.

        Returns:
            One output per sequence that advanced or ended, including those cancelled since the last step.
        """
        outputs, self._cancelled = self._cancelled, []
        scheduled = self._scheduler.schedule()
        if not scheduled:
            assert not self._live, "no sequence can run although some are waiting"
            return outputs
        self._steps += 1
        try:
            started = time.perf_counter()
            scheduled = self._draft(scheduled)
            drafted = time.perf_counter()
            logits = forward(self.model, self._kv, scheduled)
            computed, chosen, failed = verify_step(logits, scheduled, self._kv, self._scheduler)
            if chosen:
                self._draft_controller.record_step(computed, chosen, drafted - started, time.perf_counter() - drafted)
        except Exception as error:  # noqa: BLE001 (any error: requests outside this step must continue)
            return outputs + self._fail({entry.sequence.request_id: error for entry in scheduled})
        if failed:
            outputs += self._fail(failed)
        outputs += self._postprocess(chosen)
        return outputs

    def generate(self, requests: Iterable[Request], watch: Callable[[Output], None] | None = None) -> list[Output]:
        """Run requests to their end, while no others are live.

        Args:
            requests: what to run.
            watch: called with every output of every step.

        Returns:
            One merged output per sample, in the order of the requests.

        Raises:
            RequestError: one of the requests can never be served; none was run.
            Exception: the error of a failed step.
        """
        assert not self.has_work, "other requests' outputs would be lost"
        collected: dict[tuple[int, int], list[Output]] = {}
        try:
            for request in requests:
                self.add(request)
            while self._live:
                for output in self.step():
                    if output.error is not None:
                        raise output.error
                    collected.setdefault((output.request_id, output.index), []).append(output)
                    if watch is not None:
                        watch(output)
        finally:
            for request_id in list(self._live):
                self._end_request(request_id, FinishReason.CANCELLED)
        return [merge_outputs(parts) for _, parts in sorted(collected.items())]

    def check(self) -> None:
        """Assert that no sequence is lost and that every block is accounted for."""
        self._scheduler.check()
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        known = [*queued, *(child for sequence in queued for child in sequence.forks)]
        live = [sequence for sequences in self._live.values() for sequence in sequences]
        assert sorted(known, key=lambda s: s.order) == sorted(live, key=lambda s: s.order), "a sequence is lost"

    def _draft(self, scheduled: list[Scheduled]) -> list[Scheduled]:
        """The step with drafts. Blocks are copied before the proposer runs, because it may read the cache, too."""
        lengths = self._draft_controller.reserve(scheduled)
        copies, self._kv.copies = self._kv.copies, []
        if copies:
            self.model.copy_blocks(copies)
        return self._draft_controller.propose(scheduled, lengths)

    def _postprocess(self, chosen: list[tuple[Sequence, list[Sample]]]) -> list[Output]:
        """Outputs of the sequences that got tokens; those that ended are removed."""
        outputs = []
        now = time.monotonic()
        for sequence, samples in chosen:
            output = postprocess(sequence, samples, now)
            # All samples but the last are draft tokens. A sequence that ends early does not take all of them.
            self._draft_controller.commit_accepted(sequence, min(len(samples) - 1, len(output.token_ids)))
            outputs.append(output)
            if output.finish_reason is not None:
                self._remove(sequence)
        return outputs

    def _sequence(self, request: Request, request_id: int, index: int, timing: Timing) -> Sequence:
        params, prompt = request.params, array("q", request.prompt)
        return Sequence(
            request_id=request_id,
            index=index,
            params=params,
            tokens=prompt,
            num_prompt=len(prompt),
            limit=length_limit(request, self.model, self._kv.capacity),
            stop_tokens=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos),
            text=TextStream(self._decode or _no_text, prompt, params.stop, params.include_stop),
            # Seeded with a string: sample 1 of seed 5 and sample 0 of seed 6 must differ.
            random=Random() if params.seed is None else Random(f"{params.seed}:{index}"),
            timing=timing,
            constraint=None if request.constraint is None else request.constraint.copy(),
        )

    def _end_request(self, request_id: int, reason: FinishReason, error: Exception | None = None) -> list[Output]:
        """End the live sequences of a request that is cancelled or failed; returns their last outputs."""
        now = time.monotonic()
        outputs = [final_output(sequence, reason, now, error) for sequence in self._live.get(request_id, ())]
        for sequence in self._live.pop(request_id, ()):
            self._scheduler.remove(sequence)
        return outputs

    def _fail(self, errors: Mapping[int, Exception]) -> list[Output]:
        """End requests, each with its error; returns their last outputs."""
        return [
            output
            for request_id, error in errors.items()
            for output in self._end_request(request_id, FinishReason.ERROR, error)
        ]

    def _remove(self, sequence: Sequence) -> None:
        """Free what an ended sequence holds."""
        self._scheduler.remove(sequence)
        siblings = self._live[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request_id]


def _no_text(_: list[int]) -> str:
    return ""

"""Many requests, one model: schedule, draft, forward, verify, hand out.

The engine runs in one thread, and all its methods are called from that thread.
"""

import time
from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import count
from random import Random

from quantkit.errors import RequestError
from quantkit.runtime.core.detokenize import Decode, TextStream
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.output import FinishReason, Output, Timing, merge_outputs
from quantkit.runtime.core.request import Request
from quantkit.runtime.core.sequence import Sequence
from quantkit.runtime.engine.admission import check_request, length_limit
from quantkit.runtime.engine.postprocess import final_output, postprocess
from quantkit.runtime.engine.scheduler import Scheduler
from quantkit.runtime.engine.stats import EngineStats
from quantkit.runtime.engine.step import Stepper
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.kv_cache.eviction import Eviction, check_windows
from quantkit.runtime.kv_cache.offload import KVOffload
from quantkit.runtime.speculative.adaptive_length import MOST_DRAFTED
from quantkit.runtime.speculative.controller import Speculation
from quantkit.runtime.speculative.proposer import Proposer


@dataclass(frozen=True)
class EngineConfig:
    """How much runs at a time.

    Attributes:
        max_batch: running sequences at most.
        token_budget: new tokens in a step at most. Fewer bound how long a prompt's chunk holds up the others' tokens.
        prefix_caching: whether finished blocks are kept for prompts that start alike.
        draft_len: tokens of a draft, where there is a proposer; None: as many as pay, down to none.
        eviction: what a sequence drops to stay within a budget; None: nothing.

    Raises:
        RequestError: the budget does not cover one token for each running sequence, or drafts are too long.
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
        if self.draft_len is not None and not 1 <= self.draft_len <= MOST_DRAFTED:
            raise RequestError(
                f"draft_len is {self.draft_len}, it must be between 1 and {MOST_DRAFTED}; or let it adapt itself"
            )


class Engine:
    """Continuous batching over a model with a paged KV cache.

    Attributes:
        model: as given.
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
            config: how much runs at a time.
            decode: token ids to text; without it every text is empty.
            eos_token_ids: end a sequence unless its request ignores them.
            proposer: guesses tokens, so that a step gives several; without it every step gives one.
            offload: keeps known prefixes that must leave the model's cache.

        Raises:
            RequestError: the model has sliding windows that eviction would widen, or a store has no prefixes to keep.
        """
        self.model = model
        self._config = config or EngineConfig()
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        if self._config.eviction is not None:
            check_windows(self._config.eviction, model.block_size, model.sliding_window)
        caching, budget, self._offload = self._config.prefix_caching, self._config.token_budget, offload
        if offload is not None and not caching:
            raise RequestError("--kv-offload keeps known prefixes, and prefix caching is off; leave out one or the other")
        self._kv = BlockManager(model.num_blocks, model.block_size, caching, self._config.eviction, offload)
        self._speculation = Speculation(proposer, self._config.draft_len, self._kv, budget)
        self._scheduler = Scheduler(self._kv, self._config.max_batch, budget, self._speculation.released)
        self._stepper = Stepper(model, self._kv, self._scheduler, self._speculation)
        self._ids = count()
        self._steps = 0
        #: Request id -> its sequences that have not ended.
        self._live: dict[int, list[Sequence]] = {}
        #: Last outputs of sequences that were cancelled between steps.
        self._cancelled: list[Output] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do or return anything."""
        return bool(self._live or self._cancelled)

    @property
    def stats(self) -> EngineStats:
        """Where it stands now."""
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
            speculation=self._speculation.stats,
        )

    def add(self, request: Request) -> int:
        """Queue a request; returns its id.

        Raises:
            RequestError: it can never be served; nothing is allocated.
        """
        check_request(request, self.model, self._config.max_batch, self._decode is not None, self._kv.capacity)
        request_id, timing = next(self._ids), Timing(time.monotonic())
        sequences = [self._sequence(request, request_id, index, timing) for index in range(request.params.n)]
        sequences[0].forks = sequences[1:]
        self._live[request_id] = sequences
        self._scheduler.add(sequences[0])
        return request_id

    def cancel(self, request_id: int) -> bool:
        """End a request now; the next step returns its last outputs. False when it has ended already or never was."""
        outputs = self._end(request_id, FinishReason.CANCELLED)
        self._cancelled.extend(outputs)
        return bool(outputs)

    def step(self) -> list[Output]:
        """Advance by one forward of the model; what came out, one output a sequence that advanced or ended.

        A step that fails ends the requests in it, and only those, with the error; logits that are NaN or Inf only theirs.
        """
        outputs, self._cancelled = self._cancelled, []
        scheduled = self._scheduler.schedule()
        assert scheduled or not self._live, "nothing runs and something waits"
        if scheduled:
            self._steps += 1
            try:
                chosen, wrong = self._stepper.run(scheduled)
            except Exception as error:  # noqa: BLE001 (whatever it is, the other requests go on)
                failed = dict.fromkeys(entry.sequence.request_id for entry in scheduled)
                return outputs + [output for each in failed for output in self._end(each, FinishReason.ERROR, error)]
            outputs += [output for each, error in wrong.items() for output in self._end(each, FinishReason.ERROR, error)]
            now = time.monotonic()
            for sequence, samples in chosen:
                outputs.append(output := postprocess(sequence, samples, now))
                # All samples but the last are of the draft; what ends the sequence may stand before them all.
                self._speculation.settle(sequence, min(len(samples) - 1, len(output.token_ids)))
                if output.finish_reason is not None:
                    self._forget(sequence)
        return outputs

    def generate(self, requests: Iterable[Request], watch: Callable[[Output], None] | None = None) -> list[Output]:
        """Run requests to their end, with no others beside; each one's samples as whole outputs, in the order given.

        Args:
            requests: what to run.
            watch: sees every output as it comes.

        Raises:
            RequestError: one of them can never be served; none is run.
            Exception: whatever a step failed with.
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
                self._end(request_id, FinishReason.CANCELLED)
        return [merge_outputs(parts) for _, parts in sorted(collected.items())]

    def check(self) -> None:
        """Assert that no request is lost and that every block is accounted for."""
        self._scheduler.check()
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        known = [*queued, *(child for sequence in queued for child in sequence.forks)]
        live = [sequence for sequences in self._live.values() for sequence in sequences]
        assert sorted(known, key=lambda s: s.order) == sorted(live, key=lambda s: s.order), "a sequence is lost"

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
            # A string, because neighbouring seeds must not share samples.
            random=Random() if params.seed is None else Random(f"{params.seed}:{index}"),
            timing=timing,
            constraint=None if request.constraint is None else request.constraint.copy(),
        )

    def _end(self, request_id: int, reason: FinishReason, error: Exception | None = None) -> list[Output]:
        """End from outside what is left of a request."""
        now = time.monotonic()
        outputs = [final_output(sequence, reason, now, error) for sequence in self._live.get(request_id, ())]
        for sequence in self._live.pop(request_id, ()):
            self._scheduler.remove(sequence)
        return outputs

    def _forget(self, sequence: Sequence) -> None:
        """Free what a sequence that has ended holds."""
        self._scheduler.remove(sequence)
        siblings = self._live[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request_id]


def _no_text(_: list[int]) -> str:
    return ""

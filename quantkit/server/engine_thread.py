"""One thread owns the engine. Requests come to it from an event loop, and outputs go back to that loop.

Commands go to the thread through a queue and run between steps, so a cancelled request has freed its blocks before the next
step. Results are posted to the loop in order, with one call per step. All methods except those that say otherwise, and all
observers, run in the loop's thread, so nothing here needs a lock.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from queue import Empty, SimpleQueue

from quantkit.errors import RequestError
from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request
from quantkit.runtime.engine.engine import Engine
from quantkit.runtime.engine.stats import EngineStats
from quantkit.server.job import ActiveRequest, BusyError, DrainingError, EngineDiedError, Job, Observer

logger = logging.getLogger("quantkit.server")


class EngineThread:
    """Runs an engine in a thread of its own.

    Attributes:
        observers: see `Observer`; add to them before `start`.
        capacity: most sequences that are accepted at a time, running and waiting.
        draining: whether new requests are refused.
    """

    def __init__(self, engine: Engine, capacity: int, *, stalled_after: float = 60.0) -> None:
        """
        Args:
            engine: used by no other thread between `start` and `stop`.
            capacity: most sequences that are accepted at a time, running and waiting.
            stalled_after: an engine that has work but has not ended a step for this many seconds is not healthy.
        """
        self.observers: list[Observer] = []
        self.capacity, self.draining = capacity, False
        self._engine, self._stalled_after = engine, stalled_after
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[Job] = set()
        #: Request id -> request in the engine that has unfinished samples.
        self._active: dict[int, ActiveRequest] = {}
        self._died = False
        #: When the engine's thread last was idle or ended a step.
        self._beat = time.monotonic()
        self._working = False

    @property
    def idle(self) -> bool:
        """Whether no job is open."""
        return not self._open

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread runs and, if there is work, makes steps. Callable from any thread."""
        stalled = self._working and time.monotonic() - self._beat > self._stalled_after
        return self._thread.is_alive() and not self._died and not stalled

    @property
    def ready(self) -> bool:
        """Whether requests are accepted now, as far as there is room. Callable from any thread."""
        return self.healthy and not self.draining

    def start(self) -> None:
        """Start the thread; its results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread after its current step. Callable from any thread.

        Returns:
            False if the step did not end within `timeout` seconds.
        """
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @contextmanager
    def open(self, requests: Sequence[Request]) -> Iterator[Job]:
        """Queue requests that belong together. Those that still run at the end of the `with` block are cancelled.

        Raises:
            BusyError, DrainingError, EngineDiedError: they cannot be accepted now.
            RequestError: they have more samples than can ever be queued at a time.
        """
        assert self._loop is not None, "the runner was not started"
        job = Job(requests, self._loop.create_future())
        self._admit(job)
        self._open.add(job)
        self._commands.put(partial(self._add, job))
        try:
            yield job
        finally:
            self._open.remove(job)
            job.accepted.cancel()
            if job.left:
                self._commands.put(partial(self._cancel, job))

    def _admit(self, job: Job) -> None:
        if self._died:
            raise EngineDiedError
        if self.draining:
            self._refuse("draining")
            raise DrainingError
        if job.size > self.capacity:
            self._refuse("invalid")
            raise RequestError(f"{job.size} samples are asked for and {self.capacity} can be queued; send fewer at a time")
        if sum(each.size for each in self._open) + job.size > self.capacity:
            self._refuse("busy")
            raise BusyError

    def _refuse(self, reason: str) -> None:
        for observer in self.observers:
            observer.refused(reason)

    # The methods from here on run in the engine's thread.

    def _run(self) -> None:
        try:
            while self._drain_commands():
                if self._engine.has_work:
                    outputs = self._engine.step()
                    self._beat = time.monotonic()
                    self._post(self._deliver, outputs, self._engine.stats, self._beat)
        except Exception as error:
            logger.exception("the engine failed outside the requests of a step; restart the server")
            self._post(self._fail_all, error)

    def _drain_commands(self) -> bool:
        """Run all queued commands; wait for one if the engine has no work. False once the thread is to end."""
        while True:
            self._working = self._engine.has_work
            try:
                command = self._commands.get(block=not self._working)
            except Empty:
                return True
            if command is None:
                return False
            self._beat, self._working = time.monotonic(), True
            command()

    def _add(self, job: Job) -> None:
        try:
            for request in job.requests:
                job.ids.append(self._engine.add(request))
        except Exception as error:  # noqa: BLE001 (whatever adding a request raises is reported to its sender)
            self._cancel(job)
            self._post(self._reject, job, error)
        else:
            self._post(self._accept, job, list(job.ids))

    def _cancel(self, job: Job) -> None:
        for request_id in job.ids:
            self._engine.cancel(request_id)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            logger.debug("the event loop has ended; its outputs are dropped")

    # The methods from here on run in the event loop's thread.

    def _accept(self, job: Job, ids: list[int]) -> None:
        first = 0
        for request_id, request in zip(ids, job.requests, strict=True):
            self._active[request_id] = ActiveRequest(job, first, request.params.n)
            first += request.params.n
            for observer in self.observers:
                observer.arrived(request_id, request)
        if not job.accepted.done():
            job.accepted.set_result(None)

    def _reject(self, job: Job, error: Exception) -> None:
        self._refuse("invalid")
        job.left = 0
        if not job.accepted.done():
            job.accepted.set_exception(error)

    def _deliver(self, outputs: Sequence[Output], stats: EngineStats, at: float) -> None:
        # Drop outputs of a rejected job: no client waits for them.
        known = [output for output in outputs if output.request_id in self._active]
        for output in known:
            entry = self._active[output.request_id]
            entry.job.queue.put_nowait((entry.first + output.index, output))
            entry.left -= output.finish_reason is not None
            if not entry.left:
                del self._active[output.request_id]
        for observer in self.observers:
            observer.stepped(known, stats, at)

    def _fail_all(self, error: Exception) -> None:
        self._died = True
        for job in self._open:
            if not job.accepted.done():
                job.accepted.set_exception(EngineDiedError())
            job.queue.put_nowait(EngineDiedError())

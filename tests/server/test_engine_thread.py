"""The thread that owns the engine, with a model whose steps wait until the test releases them."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from torch import Tensor

from helpers.fake_model import FakeModel, expected
from quantkit.errors import RequestError
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.core.output import FinishReason, Output
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.engine.stats import EngineStats
from quantkit.server.engine_thread import EngineThread
from quantkit.server.job import BusyError, DrainingError, EngineDiedError, Job

PROMPT = list(range(9))


def request(prompt: Sequence[int] = PROMPT, count: int = 40, n: int = 1) -> Request:
    return Request(prompt, SamplingParams(temperature=0, max_tokens=count, n=n))


class Gated(FakeModel):
    """A model that counts the steps that began; a step waits until `gate` is released for it."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.gate, self.begun = threading.Semaphore(steps), 0

    def forward(self, batch: Batch) -> Tensor:
        """See `Model`."""
        self.begun += 1
        assert self.gate.acquire(timeout=30)
        return super().forward(batch)


class Watcher:
    """An observer that records what it is told."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.stats: EngineStats | None = None

    def arrived(self, request_id: int, request: Request) -> None:
        """See `Observer`."""

    def refused(self, reason: str) -> None:
        """See `Observer`."""
        self.refusals.append(reason)

    def stepped(self, outputs: Sequence[Output], stats: EngineStats, at: float) -> None:
        """See `Observer`."""
        self.stats = stats


def run(
    test: Callable[[EngineThread, Watcher], Coroutine[Any, Any, None]], model: FakeModel, max_batch: int = 4, capacity: int = 8
) -> Engine:
    """Run a test while the engine thread runs. Returns the engine, which must have nothing left to do."""
    engine = Engine(model, EngineConfig(max_batch=max_batch, token_budget=32))
    thread, watcher = EngineThread(engine, capacity, stalled_after=0.05), Watcher()
    thread.observers.append(watcher)

    async def started() -> None:
        thread.start()
        try:
            await asyncio.wait_for(test(thread, watcher), 30)
        finally:
            assert await asyncio.to_thread(thread.stop, 30)

    asyncio.run(started())
    engine.check()
    return engine


async def until(holds: Callable[[], bool]) -> None:
    """Return when the condition holds; `run` limits how long that may take."""
    while not holds():
        await asyncio.sleep(0.002)


async def tokens(job: Job) -> list[int]:
    return [token async for _, output in job.outputs() for token in output.token_ids]


@pytest.mark.parametrize("n", [1, 3])
def test_who_goes_frees_its_blocks_within_a_step(n: int) -> None:
    model = Gated(steps=2)

    async def test(thread: EngineThread, watcher: Watcher) -> None:
        with thread.open([request(n=n)]) as job:
            outputs = job.outputs()
            await anext(outputs)
            await until(lambda: model.begun == 3)
            assert thread._engine.stats.used_blocks > 0
        assert thread.idle
        model.gate.release()
        await until(lambda: watcher.stats is not None and watcher.stats.used_blocks == watcher.stats.running == 0)
        assert model.begun == 3

    run(test, model)


def test_who_goes_before_it_ran_leaves_nothing() -> None:
    model = Gated(steps=0)

    async def test(thread: EngineThread, _: Watcher) -> None:
        with thread.open([request(count=3)]) as first:
            await until(lambda: model.begun == 1)
            with thread.open([request([50, 51])]):
                pass
            model.gate.release(3)
            assert await tokens(first) == expected(PROMPT, 3)
        assert model.begun == 3

    assert run(test, model).stats.used_blocks == 0


def test_health_is_that_of_the_steps() -> None:
    model = Gated(steps=1)

    async def test(thread: EngineThread, _: Watcher) -> None:
        assert (thread.healthy, thread.ready) == (True, True)
        await asyncio.sleep(0.1)  # without work no step is missed
        assert thread.healthy
        with thread.open([request(count=2)]) as job:
            await until(lambda: not thread.healthy)
            assert not thread.ready
            model.gate.release()
            await tokens(job)
        await until(lambda: thread.healthy)

    run(test, model)


def test_a_failing_step_fails_the_requests_in_it_and_no_others() -> None:
    model = FakeModel()
    model.fail = 50

    async def test(thread: EngineThread, _: Watcher) -> None:
        with thread.open([request([50])]) as bad, thread.open([request(count=5)]) as good:
            (failed,) = [output async for _, output in bad.outputs()]
            assert failed.finish_reason is FinishReason.ERROR
            assert failed.error is not None
            assert await tokens(good) == expected(PROMPT, 5)
            assert thread.healthy

    run(test, model, max_batch=1)


def test_an_engine_that_dies_tells_everybody() -> None:
    model = Gated(steps=1)

    async def test(thread: EngineThread, _: Watcher) -> None:
        with thread.open([request()]) as job, thread.open([request([5])]) as other:
            outputs = job.outputs()
            await anext(outputs)
            thread._engine.step = die  # type: ignore[method-assign]
            model.gate.release(100)
            for each in (outputs, other.outputs()):
                with pytest.raises(EngineDiedError):
                    [output async for output in each]
        assert not thread.healthy
        with pytest.raises(EngineDiedError), thread.open([request()]):
            pass

    def die() -> list[Output]:
        raise RuntimeError("broken")

    run(test, model)


def test_all_requests_of_a_call_are_taken_or_none() -> None:
    async def test(thread: EngineThread, watcher: Watcher) -> None:
        with thread.open([request(), request([]), request()]) as job, pytest.raises(RequestError, match="no tokens"):
            await job.accepted
        assert watcher.refusals == ["invalid"]
        with thread.open([request(count=2), request([7], count=3)]) as job:
            await job.accepted
            found: dict[int, list[int]] = {}
            async for number, output in job.outputs():
                found.setdefault(number, []).extend(output.token_ids)
            assert found == {0: expected(PROMPT, 2), 1: expected([7], 3)}

    assert run(test, FakeModel()).stats.used_blocks == 0


def test_places_are_limited() -> None:
    async def test(thread: EngineThread, watcher: Watcher) -> None:
        with (
            pytest.raises(RequestError, match="9 samples are asked for and 8 can be queued"),
            thread.open([request(n=9)]),
        ):
            pass
        with thread.open([request(n=4, count=2), request(n=2, count=2)]) as job:
            with pytest.raises(BusyError), thread.open([request(n=3)]):
                pass
            thread.draining = True
            with pytest.raises(DrainingError), thread.open([request()]):
                pass
            assert (thread.healthy, thread.ready) == (True, False)
            assert len(await tokens(job)) == 6 * 2
        assert watcher.refusals == ["invalid", "busy", "draining"]

    run(test, FakeModel())

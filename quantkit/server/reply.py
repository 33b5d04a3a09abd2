"""One call that generates: queue its requests, write what comes, and end them when the client goes or time is up."""

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from quantkit.runtime.core.output import Output, merge_outputs
from quantkit.runtime.core.request import Request
from quantkit.server.errors import ApiError, api_error, timed_out
from quantkit.server.forms import Form
from quantkit.server.job import Job
from quantkit.server.runner import Runner

#: Seconds in which a client takes a stream's last words after its time was up.
_LAST_WORDS = 1.0


class ClientGoneError(Exception):
    """Nobody waits for the reply any more."""


class Reply(Response):
    """A whole JSON object, or a stream of events. It runs when it is sent, so that it sees the client go."""

    def __init__(
        self, runner: Runner, requests: Sequence[Request], form: Form, timeout: float, *, stream: bool, include_usage: bool
    ) -> None:
        """
        Args:
            runner: of the engine.
            requests: what to run.
            form: how to write it.
            timeout: seconds after which it is ended, the sending included.
            stream: events as they come instead of one object.
            include_usage: whether a stream ends with the numbers of tokens.
        """
        self._runner, self._requests, self._form, self._timeout = runner, requests, form, timeout
        self._stream, self._include_usage = stream, include_usage
        self._last: dict[int, Output] = {}
        self._started = False
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            with self._runner.open(self._requests) as job:
                work = self._send_stream(job, send) if self._stream else self._send_whole(job, scope, receive, send)
                await _while_connected(receive, work, self._timeout)
        except ClientGoneError:
            return
        except Exception as error:
            if not self._started:
                raise api_error(error) from error
            # The status is out already; an event says it instead, as OpenAI's clients understand.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._break_off(send, api_error(error)), _LAST_WORDS)

    async def _send_whole(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        await job.accepted
        parts: list[list[Output]] = [[] for _ in range(job.size)]
        async for index, output in job.outputs():
            self._note(index, output)
            parts[index].append(output)
        choices = [self._form.whole(index, merge_outputs(outputs)) for index, outputs in enumerate(parts)]
        body = self._form.envelope(choices, chunk=False) | {"usage": self._usage(job)}
        self._started = True
        await JSONResponse(body)(scope, receive, send)

    async def _send_stream(self, job: Job, send: Send) -> None:
        await job.accepted
        self._started = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(job.size):
            if (choice := self._form.opening(index)) is not None:
                await self._send_choices(send, [choice])
        async for index, output in job.outputs():
            self._note(index, output)
            if output.text or output.logprobs or output.prompt_logprobs or output.finish_reason is not None:
                await self._send_choices(send, [self._form.delta(index, output)])
        if self._include_usage:
            await _event(send, json.dumps(self._form.envelope([], chunk=True) | {"usage": self._usage(job)}))
        await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_choices(self, send: Send, choices: list[dict[str, Any]]) -> None:
        usage = {"usage": None} if self._include_usage else {}
        await _event(send, json.dumps(self._form.envelope(choices, chunk=True) | usage))

    async def _break_off(self, send: Send, error: ApiError) -> None:
        await _event(send, json.dumps(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _note(self, index: int, output: Output) -> None:
        """Remember where a sample stands, unless the engine failed it."""
        if output.error is not None:
            raise output.error
        self._last[index] = output

    def _usage(self, job: Job) -> dict[str, Any]:
        """Numbers of tokens; a prompt counts once, however many samples it has."""
        firsts, first = [], 0
        for request in job.requests:
            firsts.append(self._last[first].usage)
            first += request.params.n
        prompt, generated = sum(usage.prompt for usage in firsts), sum(out.usage.generated for out in self._last.values())
        cached = {"cached_tokens": sum(usage.cached for usage in firsts)}
        total = prompt + generated
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": total,
            "prompt_tokens_details": cached,
        }


async def _event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None], timeout: float) -> None:
    """Run `work` until it ends, the client goes, or time is up.

    Raises:
        ClientGoneError: the client went first.
        ApiError: time was up first.
        Exception: whatever `work` raises.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
        raise timed_out(timeout)
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Come back when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass

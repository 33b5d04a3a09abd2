"""The response of one generating call: runs its requests, and cancels them when the client disconnects or time is up."""

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from quantkit.runtime.core.output import Output, merge_outputs
from quantkit.runtime.core.request import Request
from quantkit.server.engine_thread import EngineThread
from quantkit.server.errors import ApiError, api_error, timed_out
from quantkit.server.job import Job
from quantkit.server.response_builder import ResponseBuilder

#: Seconds for sending the error that ends a stream.
_ERROR_SECONDS = 1.0


class ClientGoneError(Exception):
    """The client disconnected before the response was complete."""


class GenerationResponse(Response):
    """One JSON object, or a stream of server-sent events.

    The requests run while the response is sent, so that they end when the client disconnects.
    """

    def __init__(
        self,
        engine_thread: EngineThread,
        requests: Sequence[Request],
        builder: ResponseBuilder,
        timeout: float,
        *,
        stream: bool,
        include_usage: bool,
    ) -> None:
        """
        Args:
            engine_thread: runs the requests.
            requests: what to run.
            builder: builds the JSON.
            timeout: seconds after which generating and sending are aborted.
            stream: send events as outputs arrive instead of one object.
            include_usage: whether a stream ends with the token counts.
        """
        self._engine_thread, self._requests, self._builder, self._timeout = engine_thread, requests, builder, timeout
        self._stream, self._include_usage = stream, include_usage
        self._last: dict[int, Output] = {}
        self._started = False
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            with self._engine_thread.open(self._requests) as job:
                work = self._send_stream(job, send) if self._stream else self._send_whole(job, scope, receive, send)
                await _while_connected(receive, work, self._timeout)
        except ClientGoneError:
            return
        except Exception as error:
            if not self._started:
                raise api_error(error) from error
            # The status line has been sent already, so the error goes into an event, which OpenAI's clients understand.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._send_error(send, api_error(error)), _ERROR_SECONDS)

    async def _send_whole(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        await job.accepted
        parts: list[list[Output]] = [[] for _ in range(job.size)]
        async for index, output in job.outputs():
            self._note(index, output)
            parts[index].append(output)
        choices = [self._builder.whole(index, merge_outputs(outputs)) for index, outputs in enumerate(parts)]
        body = self._builder.envelope(choices, chunk=False) | {"usage": self._usage(job)}
        self._started = True
        await JSONResponse(body)(scope, receive, send)

    async def _send_stream(self, job: Job, send: Send) -> None:
        await job.accepted
        self._started = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index in range(job.size):
            if (choice := self._builder.opening(index)) is not None:
                await self._send_choices(send, [choice])
        async for index, output in job.outputs():
            self._note(index, output)
            if output.text or output.logprobs or output.prompt_logprobs or output.finish_reason is not None:
                await self._send_choices(send, [self._builder.delta(index, output)])
        if self._include_usage:
            await _event(send, json.dumps(self._builder.envelope([], chunk=True) | {"usage": self._usage(job)}))
        await _event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_choices(self, send: Send, choices: list[dict[str, Any]]) -> None:
        usage = {"usage": None} if self._include_usage else {}
        await _event(send, json.dumps(self._builder.envelope(choices, chunk=True) | usage))

    async def _send_error(self, send: Send, error: ApiError) -> None:
        await _event(send, json.dumps(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _note(self, index: int, output: Output) -> None:
        """Keep a sample's latest output; raise the error of a sample that failed."""
        if output.error is not None:
            raise output.error
        self._last[index] = output

    def _usage(self, job: Job) -> dict[str, Any]:
        """Token counts. A prompt counts once, however many samples it has."""
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
    """Run `work` until it ends, the client disconnects, or time is up.

    Raises:
        ClientGoneError: the client disconnected first.
        ApiError: time was up first.
        Exception: whatever `work` raises.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
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


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass

"""The page at `/`, used in headless Chromium as a person would use it.

Needs `chromium`, `chromium-browser` or `google-chrome` on the PATH (Debian: `apt-get install chromium`). Playwright only
drives the browser and downloads nothing.
"""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from playwright.sync_api import Browser, ConsoleMessage, HttpCredentials, Page, expect, sync_playwright

from helpers.fake_model import FakeModel
from helpers.live_server import listening
from quantkit.runtime.core.output import FinishReason, Output, Timing, Usage
from quantkit.runtime.engine.engine import Engine
from quantkit.server.dashboard import Dashboard
from quantkit.server.metrics import PrometheusMetrics
from quantkit.server.middleware import ApiKeyMiddleware
from quantkit.server.monitor import monitor_routes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; on Debian: apt-get install chromium")


class Talker:
    """A server with the same protocol, whose answers a test can predict.

    Attributes:
        asked: bodies of all calls.
        pause: seconds between the words of an answer.
        closed: number of answers that a client closed before their end.
    """

    def __init__(self, key: str | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.pause, self.closed = 0.0, 0
        model = FakeModel()
        stats = Engine(model).stats
        self.dashboard = Dashboard("tiny", stats)
        self.app = FastAPI()
        self.app.include_router(monitor_routes(PrometheusMetrics("tiny", model, stats), self.dashboard))
        self.app.post("/v1/chat/completions", response_model=None)(self.chat)
        if key is not None:
            self.app.add_middleware(ApiKeyMiddleware, key=key)

    async def chat(self, request: Request) -> Response:
        """Answer with the last message, one letter at a time, or refuse it."""
        body = await request.json()
        self.asked.append(body)
        said = body["messages"][-1]["content"]
        if said == "bad":
            return JSONResponse({"error": {"message": "the prompt has too many tokens"}}, 400)
        return StreamingResponse(self._words(said), media_type="text/event-stream")

    async def _words(self, said: str) -> AsyncIterator[bytes]:
        try:
            # An event may be split in the middle of a character.
            first = ("data: " + json.dumps({"choices": [{"delta": {"content": "é: "}}]}, ensure_ascii=False)).encode()
            yield first[:45]
            await asyncio.sleep(0.01)
            yield first[45:] + b"\n\n"
            for letter in said:
                await asyncio.sleep(self.pause)
                yield f"data: {json.dumps({'choices': [{'delta': {'content': letter}}]})}\n\n".encode()
            yield b'data: {"choices": []}\n\ndata: [DONE]\n\n'
        except (asyncio.CancelledError, GeneratorExit):
            self.closed += 1
            raise


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[tuple[Talker, str]]:
    """A running server and its URL."""
    talker = Talker(getattr(request, "param", None))
    with listening(talker.app) as url:
        yield talker, url + "/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests. Its sandbox needs rights that root in a container does not have, so it is switched off."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A new page, which may only call its own server and log no errors on the console.

    A parameter is the password that a person types when the browser asks for one.
    """
    typed = HttpCredentials(username="me", password=request.param) if hasattr(request, "param") else None
    page, complaints, hosts = browser.new_page(http_credentials=typed), [], set()

    def note(message: ConsoleMessage) -> None:
        # The browser itself reports refused calls on the console.
        if message.type == "error" and "status of 40" not in message.text:
            complaints.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    yield page
    page.close()
    assert complaints == []
    assert hosts == {"127.0.0.1"}


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_the_state_is_shown_and_stays_fresh(address: tuple[Talker, str], page: Page) -> None:
    talker, url = address
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#ttft_seconds")).to_have_text("–")
    timing = Timing(1.0, 1.125, 1.25, 3.25)
    output = Output(0, 0, Usage(4, 0, 5), timing, token_ids=[1, 2, 3, 4, 5], finish_reason=FinishReason.STOP)
    talker.dashboard.stepped([output], Engine(FakeModel()).stats, time.monotonic())
    expect(page.locator("#served")).to_have_text("1")
    expect(page.locator("#ttft_seconds")).to_have_text("250, 250, 250")
    expect(page.locator("#tpot_seconds")).to_have_text("500, 500, 500")
    expect(page.locator("#tokens_per_second")).to_have_text("0.5")
    expect(page.locator("#kv_usage")).to_have_text("0 %")
    expect(page.locator("#acceptance_rate")).to_have_text("–")


def test_a_person_chats(address: tuple[Talker, str], page: Page) -> None:
    talker, url = address
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    say(page, "  Hello <b>there</b>  ")
    # Shown as text: what a model or a person writes is never markup.
    expect(page.locator("#chat .assistant")).to_have_text("é: Hello <b>there</b>")
    expect(page.locator("#send")).to_be_visible()
    say(page, "bad")
    expect(page.locator("#chat .error")).to_have_text("the prompt has too many tokens")
    say(page, "again")
    expect(page.locator("#chat .assistant").last).to_have_text("é: again")
    first = [{"role": "user", "content": "Hello <b>there</b>"}, {"role": "assistant", "content": "é: Hello <b>there</b>"}]
    assert [body["messages"] for body in talker.asked] == [
        first[:1],
        [*first, {"role": "user", "content": "bad"}],
        [*first, {"role": "user", "content": "again"}],
    ]
    assert all((body["model"], body["stream"]) == ("tiny", True) for body in talker.asked)


def test_an_answer_streams_and_can_be_stopped(address: tuple[Talker, str], page: Page) -> None:
    talker, url = address
    talker.pause = 0.02
    page.goto(url)
    say(page, "x" * 5000)
    answer = page.locator("#chat .assistant")
    expect(answer).to_contain_text("é: xxx")
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()
    length = len(answer.inner_text())
    assert 3 < length < 5000
    end = time.monotonic() + 30
    while not talker.closed:
        assert time.monotonic() < end, "the server still writes"
        page.wait_for_timeout(20)
    assert len(answer.inner_text()) == length


@pytest.mark.parametrize("address", ["sécret"], indirect=True)
@pytest.mark.parametrize("page", ["sécret"], indirect=True)
def test_the_browser_asks_for_the_key_and_sends_it_along(address: tuple[Talker, str], page: Page) -> None:
    page.goto(address[1])
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#status")).to_be_empty()
    say(page, "Hi")
    expect(page.locator("#chat .assistant")).to_have_text("é: Hi")


@pytest.mark.parametrize("address", ["secret"], indirect=True)
@pytest.mark.parametrize("page", ["wrong"], indirect=True)
def test_a_wrong_key_shows_nothing(address: tuple[Talker, str], page: Page) -> None:
    reply = page.goto(address[1])
    assert reply is not None
    assert reply.status == 401
    assert page.locator("#running").count() == 0
    expect(page.locator("body")).to_contain_text("a valid API key is needed")


@pytest.mark.parametrize("address", ["secret"], indirect=True)
def test_the_key_may_stand_in_the_address(address: tuple[Talker, str], page: Page) -> None:
    page.goto(address[1].replace("http://", "http://me:secret@"))
    expect(page.locator("#running")).to_have_text("0")

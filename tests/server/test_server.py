"""The server as its clients see it: through OpenAI's own client, and with requests that are wrong in many ways."""

import json
import re
import shutil
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.live_server import serving, tiny_folder, wait
from quantkit.server.app import ModelEndpoints, ServerConfig

LONG = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True}
#: JSON with half of a surrogate pair as a text and as a name, and with a number that Python refuses to read.
ODD = [b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"\\ud800": 1}', b'{"seed": %s}' % (b"1" * 5000)]
USER = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder, ServerConfig("tiny", 8, max_body=6000)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)


def test_a_stream_gives_what_the_whole_gives(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["Hello", "World"], "max_tokens": 12, "temperature": 1.0}
    asked |= {"n": 2, "seed": 5, "logprobs": 2}
    whole = client.completions.create(**asked)
    parts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert [parts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == 10
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or []) == len(logprobs.tokens or []) > 0


def test_chats(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, USER]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0}
    whole = client.chat.completions.create(**asked, max_completion_tokens=9, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    chunks = client.chat.completions.create(**asked, max_tokens=9, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert choice.message.content == streamed
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content or [])


def test_models_and_tokens(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    tokens = httpx.post(url + "/tokenize", json={"prompt": "Hello"}).json()["tokens"]
    assert httpx.post(url + "/detokenize", json={"tokens": tokens}).json() == {"prompt": "Hello"}
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    by_ids, by_text = (client.completions.create(**asked, prompt=prompt) for prompt in (tokens, "Hello"))
    assert by_ids.choices[0].text == by_text.choices[0].text


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"prompt": "x", "nonsense": 1}, "nonsense"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "n": "many"}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [999999]}, "vocabulary"),
        ({"prompt": "x" * 500}, "256"),
        ({}, "prompt"),
        ({"prompt": "x", "n": 10_000}, "n"),
    ],
)
def test_what_is_wrong_is_named(url: str, body: dict[str, Any], named: str) -> None:
    reply = httpx.post(url + "/v1/completions", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert named in error["message"] or named == error["param"]
    assert "Traceback" not in reply.text
    assert "/quantkit" not in reply.text


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b"null", b'"x"', b'{"prompt": "\xff"}', b"[" * 3000, *ODD])
def test_malformed_bodies(url: str, content: bytes) -> None:
    reply = httpx.post(url + "/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_half_a_character_is_no_prompt(url: str, path: str) -> None:
    reply = httpx.post(url + path, content=b'{"prompt": "a\\udc00"}', headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "U+DC00" in reply.json()["error"]["message"]


def test_bodies_have_a_limit(url: str) -> None:
    assert httpx.post(url + "/v1/completions", json={"prompt": "x" * 7000}).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(10):
            yield b"x" * 1000

    unstated = httpx.post(url + "/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert unstated.status_code == 413


def test_unknown_models_and_paths(url: str) -> None:
    for reply in (
        httpx.post(url + "/v1/completions", json={"model": "gpt-9", "prompt": "x"}),
        httpx.get(url + "/v1/models/gpt-9"),
        httpx.get(url + "/nowhere"),
    ):
        assert reply.status_code == 404
        assert reply.json()["error"]["message"]


def test_keys(folder: Path) -> None:
    with serving(folder, ServerConfig("tiny", 2, api_key="sécret")) as (url, _):
        assert httpx.get(url + "/health").status_code == 200
        wrong = ["", "Bearer", "Bearer wrong", "Bearer sécre", "Digest sécret", "sécret", "Basic", "Basic sécret"]
        wrong += [f"Basic {b64encode(text.encode()).decode()}" for text in ("sécret", ":wrong", "sécret:", ":")]
        right = ["Bearer sécret", "bearer sécret"]
        right += [f"Basic {b64encode(text.encode()).decode()}" for text in (":sécret", "me:sécret")]
        for status, keys in ((401, wrong), (200, right)):
            for key in keys:
                reply = httpx.get(url + "/v1/models", headers=[(b"Authorization", key.encode())])
                assert reply.status_code == status, key
        assert httpx.get(url + "/v1/models").json()["error"]["code"] == "invalid_api_key"


def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    with serving(folder, ServerConfig("tiny", 2, max_waiting=1)) as (url, endpoints), httpx.Client(timeout=60) as client:
        with client.stream("POST", url + "/v1/completions", json={**LONG, "n": 2, "temperature": 1, "stream": True}) as first:
            assert first.status_code == 200
            refused = client.post(url + "/v1/completions", json={**LONG, "n": 2})
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
        # A client that disconnects in mid-stream leaves no request running.
        wait(lambda: endpoints.engine_thread.idle and endpoints.session.engine.stats.used_blocks == 0)
        assert client.post(url + "/v1/completions", json={"prompt": "x", "n": 2, "max_tokens": 2}).status_code == 200


def test_time_is_limited(folder: Path) -> None:
    with serving(folder, ServerConfig("tiny", 2, request_timeout=0.02)) as (url, endpoints):
        client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=3)
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="tiny", prompt="Hello", max_tokens=200, extra_body={"ignore_eos": True})
        assert (caught.value.status_code, caught.value.code) == (408, "timeout")
        streamed = httpx.post(url + "/v1/completions", json={**LONG, "stream": True})
        assert streamed.status_code in (200, 408)
        last = streamed.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "timeout"

        def drops() -> Iterator[bytes]:
            yield b'{"prompt": "'
            time.sleep(0.5)
            yield b'x"}'

        assert httpx.post(url + "/v1/completions", content=drops()).status_code == 408
        # OpenAI's client would repeat a request after status 408, and it would take as long again; the server tells it not to.
        wait(lambda: endpoints.engine_thread.idle)
        arrived = re.search(r"vllm:request_params_n_count\S* (\S+)", httpx.get(url + "/metrics").text)
        assert arrived is not None
        assert float(arrived[1]) <= 2  # Fewer if the short time limit passes before a body has arrived.


def test_a_server_that_drains_says_so(folder: Path) -> None:
    with serving(folder, ServerConfig("tiny", 2)) as (url, endpoints):
        assert httpx.get(url + "/ready").status_code == 200
        endpoints.engine_thread.draining = True
        assert (httpx.get(url + "/health").status_code, httpx.get(url + "/ready").status_code) == (200, 503)
        refused = httpx.post(url + "/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["Retry-After"]) >= 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on the PATH")
def test_curl(url: str) -> None:
    def curl(path: str, body: dict[str, Any]) -> tuple[str, int]:
        command = ["curl", "-sS", "-w", "%{stderr}%{http_code}", url + path, "-H", "Content-Type: application/json"]
        done = subprocess.run([*command, "-d", json.dumps(body)], check=True, capture_output=True, text=True)
        return done.stdout, int(done.stderr)

    body = {"messages": [USER], "temperature": 0, "max_tokens": 9}
    whole, status = curl("/v1/chat/completions", body)
    assert status == 200
    stream, status = curl("/v1/chat/completions", {**body, "stream": True})
    assert status == 200
    events = stream.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == json.loads(whole)["choices"][0]["message"]["content"]
    refused, status = curl("/v1/chat/completions", {**body, "zzz": 1})
    assert (status, json.loads(refused)["error"]["param"]) == (400, "zzz")


def test_a_failing_step_fails_its_requests_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, ServerConfig("tiny", 2, request_timeout=60)) as (url, endpoints):
        model = endpoints.session.engine.model
        broken = RuntimeError("secret detail of /some/path")

        def fail(_: object) -> None:
            raise broken

        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", fail)
            failed = httpx.post(url + "/v1/completions", json=LONG)
        assert failed.status_code == 500
        assert "secret" not in failed.text
        assert httpx.get(url + "/health").status_code == 200
        assert httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        assert isinstance(endpoints, ModelEndpoints)

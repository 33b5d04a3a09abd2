"""The whole server with a tiny model: constrained replies, its metrics meanwhile, and its web page."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from playwright.sync_api import expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

from helpers.live_server import serving, tiny_folder
from quantkit.server.app import ServerConfig

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", 7]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that requires the key "secret"."""
    folder = tiny_folder(tmp_path_factory.mktemp("served"))
    with serving(folder, ServerConfig("tiny", 8, api_key="secret"), "ngram") as (address, _):
        yield address


def post(url: str, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(url + path, json={"max_tokens": 200, "seed": 3, **fields}, headers=KEY, timeout=60)


def values(url: str) -> dict[str, float]:
    """Values of all metrics without labels of their own."""
    text = httpx.get(url + "/metrics", headers=KEY).text
    families = list(text_string_to_metric_families(text))
    return {s.name: s.value for family in families for s in family.samples if set(s.labels) <= {"model_name", "engine"}}


def test_completions_fit_the_schema_and_are_counted(url: str) -> None:
    before = values(url)
    body = post(url, "/v1/completions", prompt=["Hello", "World"], n=2, response_format=FORMAT).json()
    for choice in body["choices"]:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
        assert choice["finish_reason"] == "stop"
    after = values(url)
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == body["usage"]["prompt_tokens"] == 10
    generated = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert generated == body["usage"]["completion_tokens"]
    assert after["vllm:num_requests_running"] == after["vllm:kv_cache_usage_perc"] == 0
    state = httpx.get(url + "/state", headers=KEY).json()
    assert (state["model"], state["running"]) == ("tiny", 0)
    assert state["served"] >= 4


def test_chats_stream_json(url: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    text = ""
    reply = post(url, "/v1/chat/completions", messages=messages, response_format=FORMAT, stream=True)
    for line in reply.text.split("\n\n")[:-2]:
        text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
    jsonschema.validate(json.loads(text), SCHEMA)
    whole = post(url, "/v1/chat/completions", messages=messages, response_format={"type": "json_object"}, max_tokens=9).json()
    (choice,) = whole["choices"]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] in ("length", "stop")


def test_bad_schemas_get_a_400_that_says_why(url: str) -> None:
    refused = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}
    reply = post(url, "/v1/completions", prompt="Hello", response_format=refused)
    assert reply.status_code == 400
    assert "the JSON schema is refused (Invalid type: foo)" in reply.json()["error"]["message"]
    assert post(url, "/v1/completions", prompt="Hello", response_format={"type": "xml"}).status_code == 400
    # Half of a surrogate pair, where the schema does not constrain the string.
    halved = b'{"prompt": "x", "response_format": %s}' % json.dumps(FORMAT).replace("green", "\\ud800").encode()
    reply = httpx.post(url + "/v1/completions", content=halved, headers={**KEY, "Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_only_the_probe_needs_no_key(url: str) -> None:
    described = httpx.get(url + "/openapi.json", headers=KEY).json()["paths"]
    assert {"/", "/metrics", "/ready", "/state", "/tokenize", "/v1/models"} < set(described)
    status = {path: httpx.get(url + path).status_code for path in (*described, "/openapi.json", "/nowhere", "/health/")}
    assert {path for path, code in status.items() if code != 401} == {"/health"}
    assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 401


def test_a_browser_is_asked_for_the_key_and_no_other_page_can_use_it(url: str) -> None:
    assert httpx.get(url + "/").headers["WWW-Authenticate"] == 'Basic realm="quantkit", charset="UTF-8"'
    assert httpx.get(url + "/state").headers["WWW-Authenticate"] == "Bearer"
    with httpx.Client(auth=("", "secret")) as browser:
        assert browser.get(url + "/").status_code == browser.get(url + "/state").status_code == 200
        content = b'{"prompt": "x", "max_tokens": 1}'
        assert browser.post(url + "/v1/completions", json=json.loads(content)).status_code == 200
        # A content type that a form on another page can send.
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None):
            headers = {} if kind is None else {"Content-Type": kind}
            assert browser.post(url + "/v1/completions", content=content, headers=headers).status_code == 400


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; on Debian: apt-get install chromium")
def test_a_person_chats_with_the_model(url: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(http_credentials={"username": "", "password": "secret"})
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        page.get_by_label("Message").fill("Hi")
        page.get_by_label("Message").press("Enter")
        expect(page.locator("#chat .assistant")).not_to_be_empty()
        expect(page.locator("#send")).to_be_visible(timeout=30_000)
        expect(page.locator("#chat .error")).to_have_count(0)
        browser.close()

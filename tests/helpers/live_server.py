"""A tiny model, served in a thread of the tests' own process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from helpers.tiny import make_model
from quantkit.runtime.engine.engine import EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.session import Session
from quantkit.server.app import ModelEndpoints, ServerConfig, create_app


def tiny_folder(folder: Path) -> Path:
    """A random model with a chat template."""
    make_model(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}:")
    return folder


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Where an ASGI application is served."""
    sock = socket.socket()
    # Connections inherit it: with little on its way, a reader who stops is felt soon.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        wait(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        sock.close()


@contextmanager
def serving(folder: Path, config: ServerConfig, spec: str = "off") -> Iterator[tuple[str, ModelEndpoints]]:
    """The URL and the endpoints of a running server. At the end no request may be left."""
    cache = CacheOptions(memory=2**22, max_batch=config.max_batch, step_tokens=64)
    session = Session(folder, torch.device("cpu"), cache, EngineConfig(config.max_batch, token_budget=64), None, spec)
    app = create_app(session, config)
    endpoints: ModelEndpoints = app.state.endpoints
    with listening(app) as url:
        yield url, endpoints
        wait(lambda: endpoints.engine_thread.idle and not session.engine.has_work)
    session.engine.check()
    stats = session.engine.stats
    assert stats.running == stats.waiting == stats.used_blocks == 0


def wait(done: Callable[[], bool]) -> None:
    """Until `done`; a hang fails."""
    for _ in range(1000):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("it never came to that")

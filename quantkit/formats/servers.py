"""Engines that serve artifacts: the command that starts each, and whether it loads a given artifact."""

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.formats.artifact import PackedReader
from quantkit.formats.base import support_of

_HEAD = "lm_head"


@dataclass(frozen=True)
class Server:
    """An engine that serves artifacts over HTTP.

    Attributes:
        name: the name in `EngineSupport`.
        command: (model, number of GPUs) -> the command that serves the model.
    """

    name: str
    command: Callable[[str, int], list[str]]


SERVERS = {
    "vllm": Server(
        "vLLM",
        lambda model, gpus: ["vllm", "serve", model, "--tensor-parallel-size", str(gpus)],
    ),
    "sglang": Server(
        "SGLang",
        lambda model, gpus: ["python", "-m", "sglang.launch_server", "--model-path", model, "--tp-size", str(gpus)],
    ),
}


def refusal(packed: PackedReader, server: Server) -> str:
    """Why a server does not load an artifact; "" if it does."""
    engine = support_of(server.name, packed.engines(), packed.format.name)
    if not engine.loads:
        return engine.note
    if _HEAD in packed.modules and server.name not in packed.format.quantized_head:
        return f"treats the quantized output head of a {packed.format.name} artifact as a dense one"
    return ""


def notes(packed: PackedReader, server: Server) -> list[str]:
    """Notes on how a server loads an artifact that it does not refuse."""
    engine = support_of(server.name, packed.engines(), packed.format.name)
    about_head = packed.format.quantized_head.get(server.name, "") if _HEAD in packed.modules else ""
    return [note for note in (engine.note, about_head) if note]

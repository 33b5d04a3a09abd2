"""Engines that serve an artifact: the command of each, and whether it loads a given artifact."""

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.formats.artifact import PackedReader
from quantkit.formats.base import support_of

_HEAD = "lm_head"


@dataclass(frozen=True)
class Server:
    """An engine that serves.

    Attributes:
        name: as `formats` has it.
        command: (model, GPUs) -> what to run.
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
    """Why a server does not load an artifact; "" where it does."""
    engine = support_of(server.name, packed.engines(), packed.format.name)
    if not engine.loads:
        return engine.note
    if _HEAD in packed.modules and server.name not in packed.format.quantized_head:
        return f"takes the quantized output head of a {packed.format.name} artifact for a dense one"
    return ""


def notes(packed: PackedReader, server: Server) -> list[str]:
    """What to know about how a server loads an artifact that it does not refuse."""
    engine = support_of(server.name, packed.engines(), packed.format.name)
    about_head = packed.format.quantized_head.get(server.name, "") if _HEAD in packed.modules else ""
    return [note for note in (engine.note, about_head) if note]

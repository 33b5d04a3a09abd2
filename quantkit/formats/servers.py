"""Engines that serve artifacts: the command that starts each, and whether it loads a given artifact."""

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.formats.artifact import PackedReader
from quantkit.formats.base import support_of
from quantkit.utils.registry import Registry

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


def _vllm_command(model: str, gpus: int) -> list[str]:
    return ["vllm", "serve", model, "--tensor-parallel-size", str(gpus)]


def _sglang_command(model: str, gpus: int) -> list[str]:
    return ["python", "-m", "sglang.launch_server", "--model-path", model, "--tp-size", str(gpus)]


#: Name of the engine's Python package, which is also the first argument of `quantkit deploy` -> server.
SERVERS: Registry[Server] = Registry(
    "engine",
    {
        "vllm": (Server("vLLM", _vllm_command), "The vLLM server."),
        "sglang": (Server("SGLang", _sglang_command), "The SGLang server."),
    },
)


def refusal(packed: PackedReader, server: Server) -> str:
    """Why a server does not load an artifact; "" if it does."""
    engine = support_of(server.name, packed.engines(), packed.format.name)
    if not engine.loads:
        return engine.note
    if _HEAD in packed.modules and server.name not in packed.format.quantized_head:
        return f"takes the quantized output head of a {packed.format.name} artifact for a dense one"
    return ""


def notes(packed: PackedReader, server: Server) -> list[str]:
    """Notes on how a server loads an artifact that it does not refuse."""
    engine = support_of(server.name, packed.engines(), packed.format.name)
    about_head = packed.format.quantized_head.get(server.name, "") if _HEAD in packed.modules else ""
    return [note for note in (engine.note, about_head) if note]

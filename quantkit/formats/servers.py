"""Engines that serve an artifact: the command for each, and which quantized output heads it reads."""

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.formats.artifact import PackedReader

_HEAD = "lm_head"


@dataclass(frozen=True)
class Server:
    """An engine that serves.

    Attributes:
        name: as `formats` has it.
        command: (model, GPUs) -> what to run.
        packed_heads: formats of which it reads a quantized output head.
        note_on_heads: what to know about that; "" for nothing.
    """

    name: str
    command: Callable[[str, int], list[str]]
    packed_heads: tuple[str, ...]
    note_on_heads: str = ""


SERVERS = {
    "vllm": Server(
        "vLLM",
        lambda model, gpus: ["vllm", "serve", model, "--tensor-parallel-size", str(gpus)],
        ("compressed-tensors", "gptq"),
        "its output head is quantized, which vLLM reads in compressed-tensors since pull request 37291 (2026)",
    ),
    # SGLang reads a quantized head in compressed-tensors as a dense one and generates nonsense (pull request 34904).
    "sglang": Server(
        "SGLang",
        lambda model, gpus: ["python", "-m", "sglang.launch_server", "--model-path", model, "--tp-size", str(gpus)],
        ("gptq",),
    ),
}


def refusal(packed: PackedReader, server: Server) -> str:
    """Why a server does not load an artifact; "" where it does."""
    (engine,) = [each for each in packed.engines() if each.name == server.name]
    if not engine.loads:
        return engine.note
    if _HEAD in packed.modules and packed.form.name not in server.packed_heads:
        return f"takes the quantized output head of a {packed.form.name} artifact for a dense one"
    return ""


def notes(packed: PackedReader, server: Server) -> list[str]:
    """What to know about how a server loads an artifact that it does not refuse."""
    (engine,) = [each for each in packed.engines() if each.name == server.name]
    about_head = _HEAD in packed.modules and packed.form.name == "compressed-tensors" and server.note_on_heads
    return [note for note in (engine.note, about_head) if note]

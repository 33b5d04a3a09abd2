"""What machine a benchmark ran on, in the words that stand beside every result."""

import platform
from pathlib import Path
from typing import Any

import torch

from quantkit.kernels.cpu import variants

#: Processor flags that kernels are chosen by, as Linux spells them.
FLAGS = (
    *("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_tile", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def flags() -> list[str]:
    """Those of FLAGS that this processor has."""
    found = variants.processor_flags()
    return [flag for flag in FLAGS if flag in found]


def describe_machine() -> dict[str, Any]:
    """Name, flags, number of cores and threads, and versions."""
    names = [line.partition(":")[2].strip() for line in variants._cpuinfo("model name")]
    return {
        "name": f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads",
        "flags": " ".join(flags()),
        "versions": {"torch": torch.__version__},
    }


def kind() -> str:
    """A short name for kinds of processors, by what decides about kernels: "avx512-vnni-bf16-2core"."""
    have = set(flags())
    vector = "avx512" if "avx512bw" in have else "avx2" if "avx2" in have else platform.machine()
    extras = {"avx512_vnni": "vnni", "avx_vnni": "vnni", "avx512_bf16": "bf16", "amx_int8": "amx", "i8mm": "i8mm"}
    names = dict.fromkeys(name for flag, name in extras.items() if flag in have)
    return "-".join([vector, *names, f"{torch.get_num_threads()}core"])


def result_file(benchmark: str) -> Path:
    """Where a benchmark keeps its results of this kind of processor."""
    return Path(__file__).parent / "results" / f"{benchmark}-{kind()}.json"

"""Turns a launch into a job for ahead-of-time compilation, so that tests compile what would run, not a second list of
settings.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import aot

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

#: Options of a launch that are not arguments of the kernel, other than warps and stages.
_OPTIONS = {"enable_fp_fusion"}


def jobs(module: ModuleType, kernels: tuple[str, ...], launch: Callable[[], object], capability: int) -> list[aot.Job]:
    """Run `launch` on tensors of the meta device; one job for each launch of one of the `kernels` of `module`."""
    found: list[aot.Job] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in kernels:
            patch.setattr(
                module, name, _Recorder(f"{module.__name__}:{name}", getattr(module, name).arg_names, found, capability)
            )
        launch()
    return found


class _Recorder:
    """Takes the place of a kernel and records its launches."""

    def __init__(self, name: str, arguments: list[str], found: list[aot.Job], capability: int) -> None:
        self.name, self.arguments, self.found, self.capability = name, arguments, found, capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *positional: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        given = dict(zip(self.arguments, positional, strict=False))
        named = {name: value for name, value in named.items() if name not in _OPTIONS}
        signature = {name: _type(value) for name, value in given.items() if value is not None}
        divisible = tuple(name for name, value in given.items() if isinstance(value, int) and value % 16 == 0)
        absent = {name: None for name, value in given.items() if value is None}
        self.found.append(aot.Job(self.name, signature, named | absent, divisible, self.capability, num_warps, num_stages))


def _type(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"

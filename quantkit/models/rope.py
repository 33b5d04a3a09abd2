"""Rotary position embeddings whose frequencies are the same for every length of text.

The types of `rope_type` in config.json, computed as transformers does (`transformers.modeling_rope_utils`), to the bit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """A rotary position embedding as config.json describes it.

    Attributes:
        kind: `rope_type`.
        theta: base of the wavelengths.
        width: elements of a head that are rotated.
        parameters: `rope_parameters`, with `original_max_position_embeddings`.
    """

    kind: str
    theta: float
    width: int
    parameters: Mapping[str, Any]

    @property
    def is_fixed(self) -> bool:
        """Whether the frequencies are independent of the data, so that `frequencies` can compute them."""
        return self.kind in _KINDS

    def frequencies(self) -> tuple[Tensor, float]:
        """The angle per position of each pair of elements, float32 [width / 2], and the factor of rotated elements."""
        return _KINDS[self.kind](self)


def _powers(rope: RopeConfig) -> Tensor:
    """theta ^ (2 i / width)."""
    powers: Tensor = rope.theta ** (torch.arange(0, rope.width, 2, dtype=torch.int64).float() / rope.width)
    return powers


def _default(rope: RopeConfig) -> tuple[Tensor, float]:
    return 1.0 / _powers(rope), 1.0


def _linear(rope: RopeConfig) -> tuple[Tensor, float]:
    return 1.0 / _powers(rope) / rope.parameters["factor"], 1.0


def _llama3(rope: RopeConfig) -> tuple[Tensor, float]:
    """Wavelengths longer than the original context are stretched by a factor, short ones stay, between them it is smooth."""
    given, base = rope.parameters, 1.0 / _powers(rope)
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    original = given["original_max_position_embeddings"]
    wavelength = 2 * math.pi / base
    stretched = torch.where(wavelength > original / low, base / factor, base)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = ~(wavelength < original / high) * ~(wavelength > original / low)
    return torch.where(between, blended, stretched), 1.0


def _yarn(rope: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): frequencies below a range are divided by a factor, those above it stay."""
    given, width = rope.parameters, rope.width
    original = given["original_max_position_embeddings"]
    factor = given["factor"]

    def dimension(rotations: float) -> float:
        return (width * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    powers = _powers(rope)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, _yarn_scaling(given)


def _yarn_scaling(given: Mapping[str, Any]) -> float:
    """The factor that rotated elements are multiplied by."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor, scale, scale_all = given["factor"], given.get("mscale"), given.get("mscale_all_dim")

    def scaling(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scaling(scale) / scaling(scale_all) if scale and scale_all else scaling(1)


_KINDS: dict[str, Callable[[RopeConfig], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}

#: Type of rope -> the numbers that `rope_parameters` must hold.
REQUIRED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}

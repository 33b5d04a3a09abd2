"""How config.json says that some inputs go through a Hadamard transform before they are multiplied.

The transform is written as `transform_config`, in compressed-tensors' own words. But SGLang and transformers pass over that
field, and would compute nonsense without a word. So the format's name is one of ours, for the artifact and for every group of
matrices: whoever does not know it refuses the artifact.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.errors import FormatError
from quantkit.formats.base import EngineSupport

#: In place of "pack-quantized", whose tensors these are.
FORMAT = "quantkit-rotated"
_PACKED = "pack-quantized"


@dataclass(frozen=True)
class OnlineHadamard:
    """Matrices that were rotated, so that their inputs must be.

    Attributes:
        pattern: regular expression that matches their paths from the start.
        block: inputs that are transformed together, a power of two (see `reference.hadamard`).
    """

    pattern: str
    block: int

    def block_of(self, module: str) -> int:
        """`block` for a matrix that was rotated, 0 for others."""
        return self.block if re.match(self.pattern, module) else 0


def add_transform(config: Mapping[str, Any], online: OnlineHadamard) -> dict[str, Any]:
    """A compressed-tensors `quantization_config` with the transform."""
    where = {"targets": [f"re:{online.pattern}"]}
    transform = {
        "type": "hadamard",
        "head_dim": online.block,
        "apply": [where | {"location": "input"}, where | {"location": "weight_input", "inverse": True}],
    }
    groups = {name: group | {"format": FORMAT} for name, group in config["config_groups"].items()}
    return {**config, "format": FORMAT, "config_groups": groups, "transform_config": {"config_groups": {"down": transform}}}


def split_transform(config: Mapping[str, Any]) -> tuple[dict[str, Any], OnlineHadamard | None]:
    """A `quantization_config` without the transform, and the transform; None where there is none.

    Raises:
        FormatError: a transform that was not written by `add_transform`.
        KeyError, TypeError, ValueError, AttributeError: fields are missing.
    """
    transforms: Any = config.get("transform_config")
    if config.get("format") != FORMAT:
        if transforms and transforms.get("config_groups"):
            raise FormatError("transform_config of another tool cannot be applied; use a model without online transforms")
        return dict(config), None
    (transform,) = transforms["config_groups"].values()
    (target,) = transform["apply"][0]["targets"]
    block = transform["head_dim"]
    if transform["type"] != "hadamard" or not isinstance(block, int) or block < 1 or block & (block - 1):
        raise FormatError("transform_config is not a Hadamard transform in blocks of a power of two; fetch the model again")
    plain = {name: value for name, value in config.items() if name != "transform_config"} | {"format": _PACKED}
    return plain, OnlineHadamard(target.removeprefix("re:"), block)


def mark_unsupported(engines: list[EngineSupport]) -> list[EngineSupport]:
    """What becomes of the engines that load an artifact once it is rotated."""
    return [replace(engine, loads=False, note="rotated: quantkit's own engine runs it") for engine in engines]

"""How config.json states that the inputs of some matrices need a Hadamard transform.

The transform is written as `transform_config`, in the notation of compressed-tensors. But SGLang and transformers ignore that
field, and would silently compute nonsense. So the artifact and every group of matrices state a format name of quantkit's own:
an engine that does not know the name refuses the artifact.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantkit.errors import FormatError
from quantkit.formats.base import EngineSupport

#: Written in place of "pack-quantized"; the tensors are those of "pack-quantized".
FORMAT = "quantkit-rotated"
_PACKED = "pack-quantized"


@dataclass(frozen=True)
class OnlineHadamard:
    """The rotated matrices, whose inputs must be transformed at run time.

    Attributes:
        pattern: regular expression that matches the start of their module paths.
        block: number of inputs that are transformed together, a power of two (see `reference.hadamard`).
    """

    pattern: str
    block: int

    def block_of(self, module: str) -> int:
        """`block` for a matrix that was rotated, 0 for others."""
        return self.block if re.match(self.pattern, module) else 0


def add_transform(config: Mapping[str, Any], online: OnlineHadamard) -> dict[str, Any]:
    """Add the transform to a compressed-tensors `quantization_config`."""
    where = {"targets": [f"re:{online.pattern}"]}
    transform = {
        "type": "hadamard",
        "head_dim": online.block,
        "apply": [where | {"location": "input"}, where | {"location": "weight_input", "inverse": True}],
    }
    groups = {name: group | {"format": FORMAT} for name, group in config["config_groups"].items()}
    return {**config, "format": FORMAT, "config_groups": groups, "transform_config": {"config_groups": {"down": transform}}}


def split_transform(config: Mapping[str, Any]) -> tuple[dict[str, Any], OnlineHadamard | None]:
    """Split a `quantization_config` into one without the transform, and the transform (None if there is none).

    Raises:
        FormatError: the transform was not written by `add_transform`.
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
    """The same engines, none of which loads the artifact, because it is rotated."""
    return [replace(engine, loads=False, note="rotated: quantkit's own engine runs it") for engine in engines]

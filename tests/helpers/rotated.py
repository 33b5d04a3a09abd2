"""Rotated artifacts, and the logits of their dequantized weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.quantized import loud_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.evaluation.stream import final_hidden, open_model
from quantkit.quantization.progress import NoProgress
from quantkit.quantization.run import QuantizeRequest, quantize_model
from quantkit.recipe import Calibration, Recipe, Rule

CPU = torch.device("cpu")


HEAD = (Rule(match="^lm_head$", bits=8),)


def quantized(folder: Path, out: Path, **recipe: Any) -> Path:
    chosen = Recipe(**{"rotate": True, "calibration": Calibration(samples=8, seq_len=64), **recipe})
    quantize_model(QuantizeRequest(folder, out, chosen, CPU, max_memory=1 << 30, overwrite=False), NoProgress())
    return out


def maker(root: Path) -> Callable[..., tuple[Path, Path]]:
    """(family, options of the recipe) -> model and rotated artifact below `root`, made once."""
    known = dict[str, tuple[Path, Path]]()

    def get(family: str, **recipe: Any) -> tuple[Path, Path]:
        key = f"{family} {recipe}"
        if key not in known:
            folder = root / str(len(known))
            model = loud_model(folder / "model", family)
            known[key] = model, quantized(model, folder / "out", **recipe)
        return known[key]

    return get


def reference_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of an artifact's dequantized weights in float32."""
    model = open_model(Checkpoint(folder), CPU)
    return model.logits(final_hidden(model, tokens[None], lambda done, total: None))[0]

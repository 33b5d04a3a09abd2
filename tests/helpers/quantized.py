"""Tiny models with outlier channels, and their quantization without a command line."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers import tiny


def loud_model(folder: Path, family: str, **options: Any) -> Path:
    """A tiny model in which some channels of every group's input are far larger than others, so that AWQ has work to do."""
    path = tiny.make_model(folder, family, **options) / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            tensor *= torch.randn(64, generator=generator).exp().to(tensor.dtype)
        # In the fused qkv_proj and gate_up_proj, values and up come last.
        for ending, rows in (("v_proj.weight", 32), ("up_proj.weight", 128)):
            if name.endswith(ending):
                tensor[-rows:] *= torch.randn(rows, 1, generator=generator).exp().to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder

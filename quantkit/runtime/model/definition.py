"""transformers' model definition with our modules in it: linear layers over packed weights, embedding and norms."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.models.skeleton import build_skeleton, materialize_buffers, read_config
from quantkit.runtime.model import attention


@torch.no_grad()
def build_definition(
    checkpoint: Checkpoint, modules: Mapping[str, nn.Module], device: torch.device, dtype: torch.dtype
) -> Any:
    """transformers' causal language model, whose attention reads and writes paged caches.

    Args:
        checkpoint: its config.json describes the model.
        modules: path -> what replaces transformers' module there; all modules with weights.
        device: of all modules.
        dtype: of activations.

    Raises:
        CheckpointError: transformers refuses the config.
    """
    model = build_skeleton(read_config(checkpoint), attention.register(), dtype)
    put_modules(model, modules)
    materialize_buffers(model, model, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"transformers' definition has {left[0]}, which was not loaded"
    return model


def put_modules(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace modules of `root`, by path; there must be one under each path."""
    for path, module in modules.items():
        root.set_submodule(path, module, strict=True)

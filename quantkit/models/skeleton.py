"""The model's definition: transformers' own, built on the meta device from config.json."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers config of a checkpoint, which must not need code of its own.

    Raises:
        CheckpointError: the config asks for remote code, transformers refuses it, or its context holds no token.
    """
    path = checkpoint.folder / "config.json"
    if "auto_map" in checkpoint.config:
        raise CheckpointError(f"{path}: needs trust_remote_code, which quantkit never runs; use a model with built-in code")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # transformers validates with many exception types
        raise CheckpointError(f"{path}: not a config that transformers accepts ({_one_line(error)})") from error
    context = getattr(config, "max_position_embeddings", 1)  # Every supported family has one.
    if context < 1:
        raise CheckpointError(f"{path}: max_position_embeddings is {context}, it must be at least 1; fetch the file again")
    return config


def build_skeleton(config: PreTrainedConfig, attention: str, dtype: torch.dtype) -> Any:
    """transformers' causal language model without a single weight.

    Args:
        config: from `read_config`; what it says of quantization is left out.
        attention: attention implementation.
        dtype: of all parameters.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    plain = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, dtype=dtype, attn_implementation=attention)
    except Exception as error:
        raise CheckpointError(f"config.json: transformers cannot build this model ({_one_line(error)})") from error
    return model.eval()


def materialize_buffers(model: Any, root: nn.Module, device: torch.device, exclude: nn.Module | None = None) -> None:
    """Compute the buffers below `root` that no checkpoint stores (inverse frequencies, embedding scales).

    Args:
        model: the whole model, which knows how to initialise each of its modules.
        root: it, or a part of it.
        device: of the buffers.
        apart: a part of `root` to leave alone.
    """
    skipped = set() if exclude is None else set(exclude.modules())
    for module in root.modules():
        own = {name: value for name, value in module.named_buffers(recurse=False) if value.is_meta}
        if module in skipped or not own:
            continue
        for name, value in own.items():
            setattr(module, name, torch.empty_like(value, device=device))
        model._init_weights(module)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

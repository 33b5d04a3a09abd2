"""Build transformers' model from config.json on the meta device, without any weights."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.models.config import context_of, refuse_remote_code


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers config of a checkpoint. Checkpoints that bring their own code are refused.

    Raises:
        CheckpointError: the config needs remote code, transformers refuses it, or its context length is less than 1.
    """
    path = checkpoint.folder / "config.json"
    refuse_remote_code(checkpoint)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # transformers validates with many exception types
        raise CheckpointError(f"{path}: not a config that transformers accepts ({_one_line(error)})") from error
    context_of(getattr(config, "max_position_embeddings", 1), path)  # Every supported family has one.
    return config


def build_skeleton(config: PreTrainedConfig, attention: str, dtype: torch.dtype) -> Any:
    """transformers' causal language model, all of its parameters on the meta device.

    Args:
        config: from `read_config`; its `quantization_config` is ignored.
        attention: name of the attention implementation.
        dtype: the dtype of all parameters.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    dense = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(dense, dtype=dtype, attn_implementation=attention)
    except Exception as error:
        raise CheckpointError(f"config.json: transformers cannot build this model ({_one_line(error)})") from error
    return model.eval()


def materialize_buffers(model: Any, root: nn.Module, device: torch.device, exclude: nn.Module | None = None) -> None:
    """Compute the buffers inside `root` that no checkpoint stores (inverse frequencies, embedding scales).

    Args:
        model: the whole model, which knows how to initialise each of its modules.
        root: the model or a part of it.
        device: the device of the buffers.
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

"""Fold a per-channel scale of a group's input into the module that produces the input, so that no extra tensor is stored.

If the input is divided by s and the matrices that read it are multiplied by s, their outputs do not change. A norm absorbs
the division in its weight. A matrix that is already quantized absorbs it in the grid scales of its rows; its codes stay.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from quantkit.methods.grid import QuantizedWeight
from quantkit.models.families import Fold


@dataclass
class QuantizedBlock:
    """What one block will be written as.

    Attributes:
        quantized: the quantized weights, by module name.
        unquantized: the tensors that stay in 16 bit, by parameter name.
    """

    quantized: dict[str, QuantizedWeight]
    unquantized: dict[str, Tensor]


def find_channel_groups(fold: Fold, columns: int, config: PreTrainedConfig) -> Tensor:
    """For each input channel, which of the producer's last channels feeds it, int64 [K], counted from 0.

    With grouped-query attention, the values of a KV head are repeated for several query heads, so these share their scales.
    """
    channel = torch.arange(columns)
    if not fold.repeats_kv_heads:
        return channel
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = columns // heads
    head, within = channel // width, channel % width
    tied: Tensor = head // (heads // kv_heads) * width + within
    return tied


def effective_scale(fold: Fold, block: nn.Module, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [K] that takes effect for `scale` [K], because the new weight of a norm is rounded to 16 bit.

    A matrix divides by `scale` itself, up to half a unit in the last place of each stored grid scale or weight.
    """
    producer = block.get_submodule(fold.producer)
    weight = producer.weight
    assert isinstance(weight, Tensor)
    if weight.dim() != 1:
        return scale
    old = weight.float() + fold.offset
    new = _folded_norm(weight, fold, scale, dtype).float() + fold.offset
    acting = old / new
    sound = acting.isfinite() & (acting > 0)
    return torch.where(sound, acting, torch.ones_like(scale))


def _folded_norm(weight: Tensor, fold: Fold, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return ((weight.float() + fold.offset) / scale - fold.offset).to(dtype)


def fold_scale(
    fold: Fold, block: nn.Module, scale: Tensor, channel_groups: Tensor, written: QuantizedBlock, dtype: torch.dtype
) -> None:
    """Divide the producer's output by `scale` [K], which `effective_scale` returned, in the tensors of `written`."""
    producer = block.get_submodule(fold.producer)
    weight = producer.weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    if weight.dim() == 1:
        # `effective_scale` has rounded (old + offset) / scale; dividing by the effective scale gives the same weight again.
        written.unquantized[f"{fold.producer}.weight"] = _folded_norm(weight, fold, scale, dtype)
        return
    divisor = torch.ones(rows, device=scale.device)
    channels = int(channel_groups.max()) + 1
    divisor[rows - channels :][channel_groups] = scale
    name = f"{fold.producer}.bias"
    if name in written.unquantized:
        written.unquantized[name] = (written.unquantized[name].float() / divisor).to(dtype)
    if fold.producer in written.quantized:
        quantized = written.quantized[fold.producer]
        written.quantized[fold.producer] = quantized.scale_rows(divisor.reciprocal(), dtype)
    else:
        name = f"{fold.producer}.weight"
        written.unquantized[name] = (written.unquantized[name].float() / divisor[:, None]).to(dtype)

"""Fold a per-channel scale of a group's input into whatever produces that input, so that the artifact needs no extra tensor.

If the input is divided by s, the matrices that read it are multiplied by s, and nothing changes. A norm absorbs the
division in its weight; a matrix that is quantized already absorbs it in its rows' grid scales, leaving its codes alone.
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
        quantized: module name -> quantized weight.
        plain: parameter name -> tensor that stays in 16 bit.
    """

    quantized: dict[str, QuantizedWeight]
    unquantized: dict[str, Tensor]


def find_channel_groups(fold: Fold, columns: int, config: PreTrainedConfig) -> Tensor:
    """int64 [K]: which of the producer's last channels feeds each input channel, from 0.

    With grouped-query attention every value row is repeated for several query heads, which must then share a scale.
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
    """`scale` [K] as it will really act, once a norm's new weight is rounded to 16 bit.

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
    """Divide the producer's output by `scale` (from `effective_scale`, [K]) in what will be written."""
    producer = block.get_submodule(fold.producer)
    weight = producer.weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    if weight.dim() == 1:
        # (old + offset) / scale was rounded by `effective_scale`; dividing again by the acting scale reproduces it.
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

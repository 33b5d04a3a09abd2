"""Final hidden states of a model that is never in memory as a whole: one block at a time over all windows."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import NumericsError
from quantkit.formats.artifact import dense_reader, online_hadamard
from quantkit.models.config import read_model_config
from quantkit.models.skeleton import materialize_buffers, read_config
from quantkit.models.streaming import StreamedModel
from quantkit.runtime.core.batch import single_sequence_batch
from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.kv_cache.cache_format import cache_format
from quantkit.runtime.kv_cache.dtype_base import LayerShape
from quantkit.runtime.model import attention
from quantkit.runtime.model.definition import put_modules
from quantkit.runtime.model.loader import ModuleLoader
from quantkit.runtime.model.weights import WeightReader

#: Tokens that run through a block at a time.
_BATCH_TOKENS = 4096


class PackedStreamedModel(StreamedModel):
    """A streamed model whose quantized matrices (the head too) stay packed and run through the engine's kernels."""

    def load_non_block_weights(self) -> None:
        """Read embeddings, final norm and head as the engine does, without widening dtypes. Call once."""
        source = WeightReader(self.checkpoint)
        self._loader = ModuleLoader(read_model_config(self.checkpoint), source, self.device, self.dtype)
        put_modules(self.module, self._loader.outside())

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with weights prepared for the kernels; they are released when the context ends."""
        module = copy.deepcopy(self.blocks[index])
        materialize_buffers(self.module, module, self.device)
        put_modules(module, self._loader.block(index))
        yield module


class CachedStreamedModel(PackedStreamedModel):
    """A packed streamed model whose attention reads keys and values from the engine's paged cache, through its kernels.

    A window is one sequence that is computed in one step. What a token sees depends on its position only, not on how the text
    is split into steps (see `kernels.layouts.quantized_kv`). So the numbers are the same as for tokens that are generated one
    by one.

    Attributes:
        cache: KV cache of one window, for all layers; every window overwrites it.
    """

    def use_cache(self, kv_dtype: str, length: int) -> None:
        """Allocate the cache for windows of `length` tokens. Call once.

        Raises:
            ResourceError: the type does not exist, or this model or device does not support it.
        """
        self.module.set_attn_implementation(attention.register())
        heads = self.config.num_key_value_heads
        blocks: Any = self.blocks
        widths = [block.self_attn.head_dim for block in blocks]
        layers = [LayerShape(heads, width, width) for width in widths]
        form = cache_format(kv_dtype, self.config.dtype or self.dtype, layers, self.device)
        count = -(-length // form.block_size)
        self.cache = KVCache(layers, count, form.block_size, form, self.device, tail_pages=count)
        # The tokens do not matter: hidden states come from `embed`.
        batch = single_sequence_batch(torch.arange(length), 0, form.block_size)
        self.cache.prepare(batch, draft=False)
        self._attention_context = attention.AttentionContext(batch.to(self.device), self.cache)

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Like the base class; blocks also get the cache. One window at a time."""
        assert len(tokens) == 1
        hidden, kwargs = super().embed(tokens)
        return hidden, [each | {"attention_context": self._attention_context} for each in kwargs]


def open_cached(checkpoint: Checkpoint, device: torch.device, kv_dtype: str, length: int) -> CachedStreamedModel:
    """Open a model for evaluation with a KV cache of type `kv_dtype`, over windows of `length` tokens.

    Raises:
        QuantkitError: the model cannot be read, or does not support such a cache.
    """
    dtype = torch.float32 if device.type == "cpu" else read_config(checkpoint).dtype or torch.bfloat16
    model = CachedStreamedModel(checkpoint, dense_reader(checkpoint), dtype, device, online_hadamard(checkpoint))
    model.use_cache(kv_dtype, length)
    return model


def open_model(checkpoint: Checkpoint, device: torch.device, *, packed: bool = False) -> StreamedModel:
    """Open a model for evaluation without a KV cache.

    Args:
        checkpoint: a checkpoint or an artifact.
        device: where it is computed.
        packed: run packed matrices through the engine's kernels, with the engine's activation dtype. Otherwise everything is
            dequantized to float32, so that only the weights are measured and not the rounding of activations.

    Raises:
        CheckpointError, FormatError: the model cannot be read.
    """
    kind = PackedStreamedModel if packed else StreamedModel
    dtype = torch.bfloat16 if packed and device.type == "cuda" else torch.float32
    return kind(checkpoint, dense_reader(checkpoint), dtype, device, online_hadamard(checkpoint))


@torch.no_grad()
def final_hidden(model: StreamedModel, tokens: Tensor, advance: Callable[[int, int], None]) -> Tensor:
    """The output of the last block, float32 [windows, T, D] on the CPU.

    Args:
        model: the model.
        tokens: int64 [windows, T].
        advance: called with (blocks done, blocks) after each block.

    Raises:
        NumericsError: a block's output holds NaN or Inf.
    """
    rows = 1 if isinstance(model, CachedStreamedModel) else max(1, _BATCH_TOKENS // tokens.shape[1])
    hidden = torch.empty(*tokens.shape, model.config.hidden_size)
    kwargs = {}
    for batch, target in zip(tokens.split(rows), hidden.split(rows), strict=True):
        entered, kwargs[len(batch)] = model.embed(batch)
        target.copy_(entered)
    for index in range(model.block_count):
        with model.block(index) as block:
            for part in hidden.split(rows):
                out = block(part.to(model.device, model.dtype), **kwargs[len(part)][index])
                part.copy_(out[0] if isinstance(out, tuple) else out)
        if not bool(hidden.isfinite().all()):
            raise NumericsError(f"{model.checkpoint.folder}: {model.prefix(index)[:-1]} gives NaN or Inf")
        advance(index + 1, model.block_count)
    return hidden

"""A loaded model with its paged cache: what the engine steps.

On a CPU a step goes through the native decoder, which spends no Python on each layer, wherever its kernels are the fastest;
a long prompt on a processor that multiplies bfloat16, or a model that the decoder cannot express, goes through
transformers' definition. On a GPU decode steps replay CUDA graphs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import ResourceError
from quantkit.kernels import cpu
from quantkit.runtime.attention import Paged, layer_window
from quantkit.runtime.batch import Batch
from quantkit.runtime.eviction import UNBOUNDED
from quantkit.runtime.graphs import DecodeGraphs
from quantkit.runtime.kv_cache import KVCache, block_bytes, blocks_for
from quantkit.runtime.load import Definition, load_definition
from quantkit.runtime.native_build import native_decoder
from quantkit.usage import available_memory, keep_freed_memory, trim_memory

#: Share of the free memory that the cache takes when `--kv-memory` is not given.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class CacheOptions:
    """How the cache is sized.

    Attributes:
        memory: bytes; None takes half of what is free.
        max_model_len: longest sequence; None takes the model's context, or as much of it as fits.
        max_batch: sequences that run at a time.
        block_size: tokens in a block.
        dtype: of keys and values; None takes the checkpoint's.
        capacity: tokens that a sequence holds at most, where eviction bounds them; memory must hold as many.
    """

    memory: int | None = None
    max_model_len: int | None = None
    max_batch: int = 64
    block_size: int = 16
    dtype: torch.dtype | None = None
    capacity: int = UNBOUNDED


class PagedModel:
    """A model that runs batches against its paged cache; implements `runtime.model.Model`.

    Attributes:
        definition: the loaded model.
        cache: keys and values.
        vocab_size, max_model_len, block_size, num_blocks, sliding_window: what the engine must know.
    """

    def __init__(self, definition: Definition, options: CacheOptions) -> None:
        """
        Raises:
            ResourceError: the cache cannot hold one sequence of max_model_len.
        """
        self.definition = definition
        self.vocab_size: int = definition.config.vocab_size
        self.block_size = options.block_size
        dtype = options.dtype or _cache_dtype(definition)
        memory = _CACHE_SHARE * _free(definition.device) if options.memory is None else options.memory
        self.max_model_len = _length(definition, options, dtype, int(memory))
        longest, of = min((self.max_model_len, "--max-model-len"), (options.capacity, "--kv-budget"))
        self.num_blocks = blocks_for(definition.layers, options.block_size, dtype, int(memory), longest, options.max_batch, of)
        blocks = definition.module.get_submodule(definition.family.blocks)
        self.sliding_window = max(layer_window(block.self_attn, definition.config) for block in blocks)
        self.cache = KVCache(definition.layers, self.num_blocks, options.block_size, dtype, definition.device)
        self._small_step = self._small_steps(options.max_batch)

    def _small_steps(self, max_batch: int) -> Callable[[Batch], Tensor | None]:
        """A faster way for the batches that allow it; it answers None for others."""
        if self.definition.device.type == "cuda":
            return DecodeGraphs(self._run, self.cache, self.max_model_len, max_batch).forward
        decoder = native_decoder(self.definition, self.cache)
        if decoder is None:
            return lambda batch: None
        return lambda batch: decoder(batch) if cpu.native_is_best(len(batch.token_ids)) else None

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Write the batch's keys and values, return float32 logits [R, V] of its `logit_rows`."""
        moved = batch.to(self.definition.device)
        out = self._small_step(moved)
        out = self._run(moved) if out is None else out
        if batch.measured is not None and moved.measured is not None:
            batch.measured.mass.copy_(moved.measured.mass)
        return out

    def _run(self, batch: Batch) -> Tensor:
        module, tokens, positions = self.definition.module, batch.token_ids[None], batch.positions[None]
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False, "paged": Paged(batch, self.cache)}
        if not len(batch.logit_rows):
            module.base_model(**inputs)  # A prompt's piece that is not its last: only keys and values are wanted.
            return torch.empty(0, self.vocab_size, device=tokens.device)
        logits: Tensor = module(**inputs, logits_to_keep=batch.logit_rows).logits
        return logits[0].float()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (from, to) each."""
        self.cache.copy_blocks(pairs)


def open_model(folder: Path, device: torch.device, options: CacheOptions) -> PagedModel:
    """Load a checkpoint or artifact and give it a cache.

    Raises:
        QuantkitError: the model cannot be loaded or the cache is too small.
    """
    model = PagedModel(load_definition(Checkpoint(folder), device), options)
    trim_memory()  # what loading left
    keep_freed_memory()  # every forward takes the same sizes again
    return model


def _cache_dtype(definition: Definition) -> torch.dtype:
    """The type that the checkpoint declares; on a CPU activations are wider, but a wider cache would only be slower."""
    declared = definition.config.dtype
    return declared if isinstance(declared, torch.dtype) else definition.dtype


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _length(definition: Definition, options: CacheOptions, dtype: torch.dtype, memory: int) -> int:
    """Longest sequence.

    Raises:
        ResourceError: it is asked to be longer than the model's context, or nothing fits.
    """
    context: int = definition.config.max_position_embeddings
    if options.max_model_len is not None:
        if options.max_model_len > context:
            raise ResourceError(f"--max-model-len {options.max_model_len:,} is longer than the model's context of {context:,}")
        return options.max_model_len
    fits = memory // block_bytes(definition.layers, options.block_size, dtype) * options.block_size
    if fits == 0:
        raise ResourceError(f"--kv-memory of {memory:,} bytes does not hold a block of {options.block_size} tokens; give more")
    return context if options.capacity <= fits else min(context, fits)

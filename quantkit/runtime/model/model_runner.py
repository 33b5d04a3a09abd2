"""A loaded model with its paged cache: what the engine steps.

On a CPU a step goes through the native decoder, which spends no Python on each layer, wherever its kernels are the fastest;
a long prompt on a processor that multiplies bfloat16 (all weights in float32 apart), or a model that the decoder cannot
express, goes through transformers' definition. On a GPU decode steps replay CUDA graphs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RequestError, ResourceError
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.cache import KVCache, blocks_for, free_memory, require_free
from quantkit.runtime.kv_cache.dtypes import CacheFormat, cache_format, check_name, default_block_size
from quantkit.runtime.kv_cache.eviction import Budget
from quantkit.runtime.kv_cache.tail_pages import pages_needed
from quantkit.runtime.model.attention import AttentionContext, layer_window
from quantkit.runtime.model.cuda_graphs import DecodeGraphs
from quantkit.runtime.model.layers import packed, rounding
from quantkit.runtime.model.loader import Definition, load_definition
from quantkit.runtime.model.native_builder import has_fixed_ropes, native_decoder
from quantkit.utils.resources import keep_freed_memory, trim_memory

#: A forward through the definition: a batch on the model's device, and whether it is a draft.
Run = Callable[[Batch, bool], Tensor]

#: Share of the free memory that the cache takes when `--kv-memory` is not given.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class CacheOptions:
    """How the cache is sized.

    Attributes:
        memory: bytes; None takes half of what is free. memory_is: what they are to the user.
        max_model_len: longest sequence; None takes the model's context, or as much of it as fits.
        max_batch: sequences that run at a time.
        step_tokens: new tokens in a step at most.
        block_size: tokens in a block; None takes the format's own.
        dtype: of keys and values: a name of `kv_format.KV_DTYPES`, or a type of plain numbers.
        budget: what a sequence keeps of its past; memory must hold as much.

    Raises:
        ResourceError: there is no such type.
        RecipeError: the budget is too small for its policy.
    """

    memory: int | None = None
    max_model_len: int | None = None
    max_batch: int = 64
    step_tokens: int = 512
    block_size: int | None = None
    dtype: str | torch.dtype = "auto"
    budget: Budget = field(default_factory=Budget)
    memory_is: str = "--kv-memory"

    def __post_init__(self) -> None:
        check_name(self.dtype)
        self.budget.eviction(self.block_size or default_block_size(self.dtype))  # Asked before a model is loaded.


class ModelRunner:
    """A model that runs batches against its paged cache; implements `runtime.model.Model`.

    Attributes:
        definition: the loaded model.
        cache: keys and values.
        vocab_size, context, max_model_len, block_size, num_blocks, sliding_window: what the engine must know.
    """

    def __init__(self, definition: Definition, options: CacheOptions, beside: int = 0) -> None:
        """
        Args:
            definition: the loaded model.
            options: of its cache.
            beside: bytes that are taken, though they still count as free.

        Raises:
            ResourceError: the cache cannot hold one sequence of max_model_len, cannot be of the wanted type, or is larger than
                what is free.
        """
        self.definition = definition
        self.vocab_size: int = definition.config.vocab_size
        form = cache_format(options.dtype, _declared(definition), definition.layers, definition.device)
        self.block_size = options.block_size or form.block_size
        memory = _memory(options, definition.device)
        pages = pages_needed(self.block_size, options.max_batch, options.step_tokens) if form.paged else 0
        apart = pages * form.page_bytes(definition.layers, self.block_size)
        self.context: int = options.max_model_len or definition.config.max_position_embeddings
        self.max_model_len = _length(definition, options, form, self.block_size, memory, apart)
        longest, of = min((self.max_model_len, "--max-model-len"), (options.budget.capacity(self.block_size), "--kv-budget"))
        sizes = memory, longest, options.max_batch, apart, of, options.memory_is
        self.num_blocks = blocks_for(definition.layers, self.block_size, form, *sizes)
        taken = apart + self.num_blocks * form.block_bytes(definition.layers, self.block_size)
        require_free(taken, definition.device, beside)
        self.cache = KVCache(definition.layers, self.num_blocks, self.block_size, form, definition.device, pages)
        blocks = definition.module.get_submodule(definition.family.blocks_path)
        self.sliding_window = max(layer_window(block.self_attn, definition.config) for block in blocks)
        self._max_batch = options.max_batch
        self._small_step = self._small_steps(self._run, 0)

    def _small_steps(self, run: Run, activation_bits: int) -> Callable[[Batch, bool], Tensor | None]:
        """A faster way than `run` for the batches that allow it; it answers None for others."""
        if self.definition.device.type == "cuda":
            if not has_fixed_ropes(self.definition.module.base_model.rotary_emb):
                return lambda batch, draft: None  # What depends on the data on the host cannot be replayed.
            return DecodeGraphs(run, self.cache, self.max_model_len, self._max_batch).forward
        decoder = native_decoder(self.definition, self.cache, activation_bits)
        if decoder is None:
            return lambda batch, draft: None
        weights = [linear.kernel_weight for linear in self.definition.linears()]
        float32 = all(isinstance(weight, cpu_matmul.CpuWeight) and weight.is_float32 for weight in weights)
        best = partial(cpu_matmul.native_is_best, float32=float32)
        return lambda batch, draft: decoder(batch, draft) if best(len(batch.token_ids)) else None

    @torch.inference_mode()
    def forward(self, batch: Batch, draft: bool = False) -> Tensor:
        """Write the batch's keys and values, return float32 logits [R, V] of its `logit_rows`.

        With `draft` the tokens are tentative: until a forward without it has computed them again, one may begin before them.
        Attention then reads only the upper plane of an "int4+4" cache.
        """
        return self._forward(batch, draft, self._run, self._small_step)

    def quantized_draft(self, activation_bits: int) -> Callable[[Batch], Tensor]:
        """`forward` of a draft with inputs of packed weights rounded to 4 or 8 bits: QSpec (arXiv 2410.11305).

        It reads the same weights and writes its keys and values to the same cache, where those of `forward` belong.

        Raises:
            RequestError: no weight is packed, so that nothing would be rounded.
        """
        if not any(packed(linear.kernel_weight) for linear in self.definition.linears()):
            raise RequestError("--spec qspec: drafts with packed weights, and this model has none; quantize it first")
        linears, head = self.definition.linears(), self.definition.module.get_output_embeddings()

        def run(batch: Batch, draft: bool) -> Tensor:
            with rounding(linears, head, activation_bits):
                return self._run(batch, draft)

        small_step = self._small_steps(run, activation_bits)
        return torch.inference_mode()(lambda batch: self._forward(batch, True, run, small_step))

    def _forward(self, batch: Batch, draft: bool, run: Run, small_step: Callable[[Batch, bool], Tensor | None]) -> Tensor:
        device = self.definition.device
        self.cache.prepare(batch, draft)
        moved = batch.to(device)
        # Triton launches on the current device, which every thread has its own of. -1: whichever it is.
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            out = small_step(moved, draft)
            out = run(moved, draft) if out is None else out
        if batch.attention_mass is not None and moved.attention_mass is not None:
            batch.attention_mass.mass.copy_(moved.attention_mass.mass)
        return out

    def _run(self, batch: Batch, draft: bool) -> Tensor:
        module, tokens, positions = self.definition.module, batch.token_ids[None], batch.positions[None]
        paged = AttentionContext(batch, self.cache, draft)
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False, "paged": paged}
        if not len(batch.logit_rows):
            module.base_model(**inputs)  # A prompt's piece that is not its last: only keys and values are wanted.
            return torch.empty(0, self.vocab_size, device=tokens.device)
        logits: Tensor = module(**inputs, logits_to_keep=batch.logit_rows).logits
        return logits[0].float()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (from, to) each."""
        self.cache.copy_blocks(pairs)


def open_model(folder: Path, device: torch.device, options: CacheOptions) -> ModelRunner:
    """Load a checkpoint or artifact and give it a cache.

    Raises:
        QuantkitError: the model cannot be loaded or the cache is too small.
    """
    model = ModelRunner(load_definition(Checkpoint(folder), device), options)
    trim_memory()  # what loading left
    keep_freed_memory()  # every forward takes the same sizes again
    return model


def open_with_draft(folder: Path, draft: Path, device: torch.device, options: CacheOptions) -> tuple[ModelRunner, ModelRunner]:
    """Load a model and a smaller one that drafts for it. The memory is shared out so that both caches hold as many tokens.

    The drafter's cache drops nothing: it drafts for texts that it holds whole. It is not quantized by pages either, but token
    by token: a sequence may go without drafts for long, and its open page would have to be kept for it meanwhile.

    Raises:
        QuantkitError: one of them cannot be loaded or the memory is too small.
    """
    main, small = (load_definition(Checkpoint(each), device) for each in (folder, draft))
    trim_memory()
    memory = _memory(options, device)
    paged = cache_format(options.dtype, _declared(main), main.layers, device).paged
    of_draft = replace(options, dtype="int8" if paged else options.dtype, budget=Budget())
    (main_bytes, main_tokens, apart), (size, block_size, _) = _block(main, options), _block(small, of_draft)
    left = max(0, memory - apart) * size * main_tokens // (main_bytes * block_size + size * main_tokens)
    model = ModelRunner(main, replace(options, memory=memory - left, memory_is="--kv-memory: the model's share"))
    longest = min(model.max_model_len, small.config.max_position_embeddings, left // size * block_size)
    of_draft = replace(of_draft, memory=left, max_model_len=longest or None, memory_is="--kv-memory: the draft model's share")
    drafter = ModelRunner(small, of_draft, model.cache.nbytes if device.type == "cpu" else 0)
    keep_freed_memory()
    return model, drafter


def _memory(options: CacheOptions, device: torch.device) -> int:
    """Bytes for the cache."""
    return int(_CACHE_SHARE * free_memory(device)) if options.memory is None else options.memory


def _block(definition: Definition, options: CacheOptions) -> tuple[int, int, int]:
    """Bytes and tokens of a block, and bytes of all open pages."""
    form = cache_format(options.dtype, _declared(definition), definition.layers, definition.device)
    block_size = options.block_size or form.block_size
    pages = pages_needed(block_size, options.max_batch, options.step_tokens)
    return form.block_bytes(definition.layers, block_size), block_size, pages * form.page_bytes(definition.layers, block_size)


def _declared(definition: Definition) -> torch.dtype:
    """The type that the checkpoint declares; on a CPU activations are wider, but a wider cache would only be slower."""
    declared = definition.config.dtype
    return declared if isinstance(declared, torch.dtype) else definition.dtype


def _length(definition: Definition, options: CacheOptions, form: CacheFormat, block_size: int, memory: int, apart: int) -> int:
    """Longest sequence; of the `memory`, `apart` bytes are not for blocks.

    Raises:
        ResourceError: it is asked to be longer than the model's context, or nothing fits.
    """
    context: int = definition.config.max_position_embeddings
    if options.max_model_len is not None:
        if options.max_model_len > context:
            raise ResourceError(f"--max-model-len {options.max_model_len:,} is longer than the model's context of {context:,}")
        return options.max_model_len
    fits = (memory - apart) // form.block_bytes(definition.layers, block_size) * block_size
    if fits <= 0:
        beside = f" beside {apart:,} bytes of open pages" if apart else ""
        found = f"{options.memory_is} of {memory:,} bytes does not hold a block of {block_size} tokens{beside}"
        raise ResourceError(f"{found}; give more")
    return context if options.budget.capacity(block_size) <= fits else min(context, fits)

"""A loaded model with its paged cache: what the engine steps.

Each batch goes to the first backend that supports it, see `ModelRunner._backends`. On a CPU that is the native decoder; models
that it cannot express go through transformers' definition. On a GPU decode steps replay CUDA graphs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RequestError
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.eviction import Budget
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.kv_cache.sizing import BlockLayout, cache_memory, draft_share, plan_cache
from quantkit.runtime.model.backends import Backend, EagerBackend, native_backend
from quantkit.runtime.model.cuda_graphs import CudaGraphBackend
from quantkit.runtime.model.layers import is_packed
from quantkit.runtime.model.loader import LoadedModel, load_model
from quantkit.utils.resources import keep_freed_memory, trim_memory


class ModelRunner:
    """A model that runs batches against its paged cache; implements `runtime.core.model.Model`.

    Attributes:
        loaded: the model without its cache.
        cache: keys and values.
        backends: ways to compute a batch, the fastest first; the last one supports every batch.
        vocab_size, context, max_model_len, block_size, num_blocks, sliding_window: see `runtime.core.model.Model`.
    """

    def __init__(self, loaded: LoadedModel, options: CacheOptions, other_bytes: int = 0) -> None:
        """
        Args:
            loaded: the model.
            options: of its cache.
            other_bytes: bytes that are allocated for other caches, though the system still counts them as free.

        Raises:
            ResourceError: the cache cannot hold one sequence of max_model_len, cannot have the dtype, or is larger than the
                free memory.
        """
        self.loaded = loaded
        self.vocab_size = loaded.config.vocab_size
        plan = plan_cache(loaded.cached_model, options, other_bytes)
        self.context: int = options.max_model_len or loaded.config.context
        self.max_model_len, self.num_blocks = plan.max_model_len, plan.num_blocks
        self.block_size = plan.layout.block_size
        self.cache = plan.allocate(loaded.cached_model)
        self.sliding_window = max(loaded.config.windows)
        self._max_batch = options.max_batch
        self.backends = self._backends()

    def _backends(self, activation_bits: int = 0) -> list[Backend]:
        """The backends for this model and device, the fastest first. This is the only place that chooses them.

        Args:
            activation_bits: 4 or 8 quantizes the inputs of packed weights; 0 leaves them alone.
        """
        loaded, cache = self.loaded, self.cache
        eager = EagerBackend(loaded, cache, activation_bits)
        native = native_backend(loaded, cache, activation_bits) if loaded.device.type == "cpu" else None
        if native is not None:
            return [native, eager]
        eager.definition()  # It runs from the first batch on: what is wrong with it shows while the model is loaded.
        if loaded.device.type == "cuda":
            # A rotary embedding that looks at the data on the host cannot be replayed.
            replayable = all(rope.is_fixed for rope in loaded.config.ropes)
            graphs = CudaGraphBackend(eager.forward, cache, self.max_model_len, self._max_batch)
            return [graphs, eager] if replayable else [eager]
        return [eager]

    @torch.inference_mode()
    def forward(self, batch: Batch, draft: bool = False) -> Tensor:
        """Write the batch's keys and values, return float32 logits [R, V] of its `logit_rows`.

        With `draft` the tokens are tentative: a later forward may begin before them, until one without `draft` has computed
        them again. Attention then reads only the upper plane of an "int4+4" cache.
        """
        return self._forward(batch, draft, self.backends)

    def quantized_draft(self, activation_bits: int) -> Callable[[Batch], Tensor]:
        """`forward` of a draft that quantizes the inputs of packed weights to 4 or 8 bits: QSpec (arXiv 2410.11305).

        It reads the same weights as `forward`, and writes its keys and values to the same slots of the same cache.

        Raises:
            RequestError: no weight is packed, so nothing would be quantized.
        """
        if not any(is_packed(linear.kernel_weight) for linear in self.loaded.linears()):
            raise RequestError("--spec qspec: drafts with packed weights, and this model has none; quantize it first")
        backends = self._backends(activation_bits)
        return torch.inference_mode()(lambda batch: self._forward(batch, True, backends))

    def _forward(self, batch: Batch, draft: bool, backends: Sequence[Backend]) -> Tensor:
        device = self.loaded.device
        self.cache.prepare(batch, draft)
        moved = batch.to(device)
        # Triton launches on the current device, which each thread has its own of; -1 keeps the current one.
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            backend = next(each for each in backends if each.supports(moved))
            out = backend.forward(moved, draft)
        if batch.attention_mass is not None and moved.attention_mass is not None:
            batch.attention_mass.mass.copy_(moved.attention_mass.mass)
        return out

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole cache blocks, (source, target) each."""
        self.cache.copy_blocks(pairs)


def open_model(folder: Path, device: torch.device, options: CacheOptions) -> ModelRunner:
    """Load a checkpoint or artifact and give it a cache.

    Raises:
        QuantkitError: the model cannot be loaded, or the cache is too small.
    """
    model = ModelRunner(load_model(Checkpoint(folder), device), options)
    trim_memory()  # Returns what loading has left.
    keep_freed_memory()  # Every forward allocates the same sizes again.
    return model


def open_with_draft(folder: Path, draft: Path, device: torch.device, options: CacheOptions) -> tuple[ModelRunner, ModelRunner]:
    """Load a model and a smaller one that drafts for it. The memory is divided so that both caches hold as many tokens.

    The draft model's cache evicts nothing: it drafts for texts that it holds entirely. It is never quantized block by block
    either, but token by token: a sequence may go without drafts for long, and its tail page would have to be kept meanwhile.

    Raises:
        QuantkitError: one of them cannot be loaded, or the memory is too small.
    """
    main, small = (load_model(Checkpoint(each), device) for each in (folder, draft))
    trim_memory()
    memory, layout = cache_memory(options, device), BlockLayout.of(main.cached_model, options)
    dtype = "int8" if layout.format.has_tail_pages else options.dtype
    draft_options = replace(options, dtype=dtype, budget=Budget())
    draft_layout = BlockLayout.of(small.cached_model, draft_options)
    share = draft_share(memory, layout, draft_layout)
    options = replace(options, memory=memory - share, memory_source="--kv-memory: the model's share")
    model = ModelRunner(main, options)
    fits = share // draft_layout.block_bytes * draft_layout.block_size
    longest = min(model.max_model_len, small.cached_model.context, fits)
    source = "--kv-memory: the draft model's share"
    draft_options = replace(draft_options, memory=share, max_model_len=longest or None, memory_source=source)
    drafter = ModelRunner(small, draft_options, model.cache.nbytes if device.type == "cpu" else 0)
    keep_freed_memory()
    return model, drafter

"""The backends of a forward pass: each is one way to compute a batch, and says which batches it takes.

`ModelRunner` holds its backends with the fastest first and gives each batch to the first one that supports it. `EagerBackend`
supports every batch and is always the last.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.kernels.cpu import library
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.model.attention import AttentionContext
from quantkit.runtime.model.layers import quantized_activations
from quantkit.runtime.model.loader import LoadedModel
from quantkit.runtime.model.native_builder import describe
from quantkit.runtime.model.native_decoder import NativeDecoder


class Backend(Protocol):
    """One way to compute a forward pass.

    Attributes:
        name: "eager", "native" or "cuda_graphs".
    """

    name: str

    def supports(self, batch: Batch) -> bool:
        """Whether this backend should compute the batch, which is on the model's device."""
        ...

    def forward(self, batch: Batch, draft: bool) -> Tensor:
        """Write the batch's keys and values to the cache; return the logits of its `logit_rows`, float32 [R, V].

        Args:
            batch: supported, and on the model's device.
            draft: the tokens are tentative, and attention reads only the upper plane of an "int4+4" cache.
        """
        ...


class EagerBackend:
    """Calls transformers' model definition, layer by layer in Python."""

    name = "eager"

    def __init__(self, loaded: LoadedModel, cache: KVCache, activation_bits: int = 0) -> None:
        """
        Args:
            loaded: the model.
            cache: where its attention layers read and write.
            activation_bits: 4 or 8 quantizes the inputs of packed weights to that many bits; 0 leaves them alone.
        """
        self._loaded, self._cache, self._activation_bits = loaded, cache, activation_bits
        self._linears = loaded.linears() if activation_bits else set()

    def definition(self) -> Any:
        """transformers' model, which the first call builds.

        Raises:
            CheckpointError: transformers refuses the config.
        """
        return self._loaded.definition

    def supports(self, batch: Batch) -> bool:
        """Every batch."""
        return True

    def forward(self, batch: Batch, draft: bool) -> Tensor:
        """See `Backend`."""
        if not self._activation_bits:
            return self._forward(batch, draft)
        with quantized_activations(self._linears, self._loaded.head, self._activation_bits):
            return self._forward(batch, draft)

    def _forward(self, batch: Batch, draft: bool) -> Tensor:
        definition, tokens, positions = self.definition(), batch.token_ids[None], batch.positions[None]
        context = AttentionContext(batch, self._cache, draft)
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False, "attention_context": context}
        if not len(batch.logit_rows):
            # A chunk of a prompt that is not its last: only its keys and values are wanted.
            definition.base_model(**inputs)
            return torch.empty(0, self._loaded.config.vocab_size, device=tokens.device)
        logits: Tensor = definition(**inputs, logits_to_keep=batch.logit_rows).logits
        return logits[0].float()


class NativeBackend:
    """One C call for the whole decoder, on a CPU: no Python is spent on single layers."""

    name = "native"

    def __init__(self, decoder: NativeDecoder) -> None:
        """
        Args:
            decoder: the model, laid out for the native kernels.
        """
        self._decoder = decoder

    def supports(self, batch: Batch) -> bool:
        """Every batch."""
        return True

    def forward(self, batch: Batch, draft: bool) -> Tensor:
        """See `Backend`."""
        return self._decoder.forward(batch, draft)


def native_backend(loaded: LoadedModel, cache: KVCache, activation_bits: int = 0) -> NativeBackend | None:
    """The native backend of a model on a CPU; None where no compiler is found or the decoder cannot express the model.

    Args:
        loaded, cache, activation_bits: see `EagerBackend`.
    """
    model = describe(loaded) if library.load() is not None else None
    if model is None:
        return None
    return NativeBackend(NativeDecoder(model, cache.keys, cache.values, activation_bits))

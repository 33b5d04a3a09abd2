"""The protocol of a model, as the engine uses it."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quantkit.runtime.core.batch import Batch


class Model(Protocol):
    """A language model with its paged KV cache.

    Attributes:
        vocab_size: width of the logits.
        context: longest sequence, prompt and output together, that the model or `--max-model-len` allows.
        max_model_len: the same, or less if KV memory holds less.
        block_size: tokens per KV block.
        num_blocks: number of KV blocks.
        sliding_window: widest sliding window of a layer, in tokens; 0 if no layer has one.
    """

    vocab_size: int
    context: int
    max_model_len: int
    block_size: int
    num_blocks: int
    sliding_window: int

    def forward(self, batch: Batch) -> Tensor:
        """Run a batch: write its keys and values to their slots and compute logits.

        If `batch.attention_mass` is set, every layer's attention mass is added to it.

        Args:
            batch: on the CPU.

        Returns:
            Logits, float32 [R, V], on the model's device. They belong to the caller, who may change them.
        """
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of whole blocks before the forward pass of the same step.

        Args:
            pairs: (from, to). A block may be the target of a pair only after the pairs that read it, so copying one pair
                after another and reading all sources first give the same result.
        """
        ...

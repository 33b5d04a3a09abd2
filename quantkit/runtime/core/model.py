"""What the engine needs of a model."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quantkit.runtime.core.batch import Batch


class Model(Protocol):
    """A language model with its paged KV cache.

    Attributes:
        vocab_size: width of the logits.
        context: longest sequence, prompt and output together, as far as the model goes or is asked to go.
        max_model_len: the same; shorter where KV memory holds less.
        block_size: tokens in a KV block.
        num_blocks: KV blocks.
        sliding_window: tokens that a layer of a limited view sees, the widest such; 0 where every layer sees everything.
    """

    vocab_size: int
    context: int
    max_model_len: int
    block_size: int
    num_blocks: int
    sliding_window: int

    def forward(self, batch: Batch) -> Tensor:
        """Write the batch's keys and values to their slots; logits, float32 [R, V], on the model's device.

        The batch is on the CPU. The result belongs to the caller, who may change it. Where sequences are measured, their
        attention is added to `batch.attention_mass`.
        """
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the keys and values of whole blocks, (from, to) each, before the forward of the same step.

        One pair's source may be another's target, which then stands later: reading all sources first and copying one
        after another are both right.
        """
        ...

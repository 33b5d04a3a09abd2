"""The forward phase of a step: one forward pass of the model over all scheduled tokens."""

from collections.abc import Sequence as SequenceOf

from torch import Tensor

from quantkit.runtime.core.batch import build_batch
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.sequence import Scheduled
from quantkit.runtime.kv_cache.block_manager import BlockManager


def forward(model: Model, kv: BlockManager, scheduled: SequenceOf[Scheduled]) -> Tensor:
    """Run the model, and store the attention mass that eviction needs in the sequences.

    Args:
        model: owns the KV cache that `kv` manages.
        kv: has reserved blocks for the new tokens and has no copies pending. The tokens are not committed here.
        scheduled: the step.

    Returns:
        Logits, float32 [R, V], of the rows that need them.
    """
    attention_of = [i for i, entry in enumerate(scheduled) if kv.needs_attention_mass(entry.sequence, entry.num_tokens)]
    batch = build_batch(scheduled, model.block_size, attention_of)
    logits = model.forward(batch)
    if batch.attention_mass is not None:
        for i, mass in zip(attention_of, batch.attention_mass.mass.tolist(), strict=True):
            sequence = scheduled[i].sequence
            sequence.mass = mass[: len(sequence.blocks)]
    return logits

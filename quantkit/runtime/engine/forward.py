"""One forward of the model over what is scheduled."""

from collections.abc import Sequence as SequenceOf

from torch import Tensor

from quantkit.runtime.core.batch import build_batch
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.sequence import Scheduled
from quantkit.runtime.kv_cache.block_manager import BlockManager


def forward(model: Model, kv: BlockManager, scheduled: SequenceOf[Scheduled]) -> Tensor:
    """Run the model, and note the attention that eviction goes by; float32 logits [R, V] of the rows that need them.

    Args:
        model: with the cache that `kv` manages.
        kv: has made room for the new tokens, and its copies are done; they are not committed here.
        scheduled: the sequences' parts.
    """
    measured = [i for i, entry in enumerate(scheduled) if kv.needs_attention_mass(entry.sequence, entry.num_tokens)]
    batch = build_batch(scheduled, model.block_size, measured)
    logits = model.forward(batch)
    if batch.attention_mass is not None:
        for i, mass in zip(measured, batch.attention_mass.mass.tolist(), strict=True):
            sequence = scheduled[i].sequence
            sequence.mass = mass[: len(sequence.blocks)]
    return logits

"""Drafts from the model itself at less cost: with rounded activations, QSpec (arXiv 2410.11305), or from the upper half of a
hierarchical KV cache, QuantSpec (arXiv 2502.10424).

The draft reads the weights and the KV cache of the model that verifies, so it takes no memory and never has anything to catch
up on. What it writes to the cache stands in the slots of the tokens that it drafts, and the forward that verifies them
overwrites it.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.runtime.core.batch import Batch, build_batch
from quantkit.runtime.core.sequence import Draft, Scheduled, Sequence
from quantkit.runtime.speculative.drafting import draft


class SelfDraft:
    """Implements `Proposer`."""

    def __init__(self, forward: Callable[[Batch], Tensor], block_size: int) -> None:
        """
        Args:
            forward: of tentative tokens: `ModelRunner.quantized_draft`, or `ModelRunner.forward` as a draft.
            block_size: of the model's cache.
        """
        self._forward, self._block_size = forward, block_size

    @torch.inference_mode()
    def propose(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[Draft]:
        """See `Proposer`. What a sequence samples from is what its drafts are drawn from, as the cheaper forward sees it."""
        lengths = dict(wanted)
        drafts = draft(lengths, self._extend([(sequence, []) for sequence in lengths]), self._extend)
        return [drafts[sequence] for sequence, _ in wanted]

    def accepted(self, sequence: Sequence, count: int) -> None:
        """Nothing to do: the forward that verified has written the cache."""

    def backlog(self, sequence: Sequence) -> int:
        """None."""
        return 0

    def released(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def _extend(self, drafts: SequenceOf[tuple[Sequence, list[int]]]) -> Tensor:
        """Compute the newest token of each sequence and draft; logits behind it, float32 [S, V]."""
        return self._forward(build_batch([_newest(*each) for each in drafts], self._block_size))


def _newest(sequence: Sequence, tokens: list[int]) -> Scheduled:
    """The last token of a sequence and its draft as a step, in which those before it are computed."""
    ahead = replace(sequence, num_computed=sequence.num_computed + len(tokens))
    return Scheduled(ahead, 1, 1, Draft(tokens[-1:]))

"""Drafts from the model itself at less cost: with quantized activations, QSpec (arXiv 2410.11305), or from the upper half of a
hierarchical KV cache, QuantSpec (arXiv 2502.10424).

The draft reads the weights and the KV cache of the model that verifies, so it takes no memory of its own and never has
anything to catch up on. Keys and values that it writes go to the slots of the drafted tokens, and the forward that verifies
these tokens overwrites them.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quantkit.errors import RequestError
from quantkit.runtime.core.batch import Batch, build_batch
from quantkit.runtime.core.sequence import Draft, Scheduled, Sequence
from quantkit.runtime.model.model_runner import open_model
from quantkit.runtime.speculative.drafting import draft
from quantkit.runtime.speculative.opened_model import OpenedModel
from quantkit.runtime.speculative.proposers import SpecRequest

#: The KV dtype whose upper half QuantSpec drafts from.
_HIERARCHICAL = "int4+4"


class SelfDraft:
    """Drafts with a cheaper forward of the model itself; implements `Proposer`."""

    def __init__(self, forward: Callable[[Batch], Tensor], block_size: int) -> None:
        """
        Args:
            forward: the cheaper forward: `ModelRunner.quantized_draft`, or `ModelRunner.forward` as a draft.
            block_size: of the model's cache.
        """
        self._forward, self._block_size = forward, block_size

    @torch.inference_mode()
    def propose(self, wanted: SequenceOf[tuple[Sequence, int]]) -> list[Draft]:
        """See `Proposer`. Drafts are sampled as the sequence samples, from the distribution that the cheaper forward gives."""
        lengths = dict(wanted)
        drafts = draft(lengths, self._extend([(sequence, []) for sequence in lengths]), self._extend)
        return [drafts[sequence] for sequence, _ in wanted]

    def accepted(self, sequence: Sequence, count: int) -> None:
        """Do nothing: the forward that verified has written the cache."""

    def backlog(self, sequence: Sequence) -> int:
        """0, because the cache is that of the model itself."""
        return 0

    def released(self, sequence: Sequence) -> None:
        """Do nothing: no state is kept."""

    def _extend(self, drafts: SequenceOf[tuple[Sequence, list[int]]]) -> Tensor:
        """Compute the newest token of each sequence and its draft; returns the logits after it, float32 [S, V]."""
        return self._forward(build_batch([_newest(*each) for each in drafts], self._block_size))


def _newest(sequence: Sequence, tokens: list[int]) -> Scheduled:
    """A step that computes the last token of a sequence and its draft; all tokens before it count as computed."""
    ahead = replace(sequence, num_computed=sequence.num_computed + len(tokens))
    return Scheduled(ahead, 1, 1, Draft(tokens[-1:]))


def open_qspec(request: SpecRequest) -> OpenedModel:
    """Load a model that drafts for itself with quantized activations.

    Raises:
        RequestError: activations cannot be quantized to that many bits, or the model has no packed weights.
        QuantkitError: the model cannot be loaded, or the cache is too small.
    """
    if request.act_bits not in (4, 8):
        raise RequestError(f"--draft-act-bits {request.act_bits}: activations are quantized to 4 or 8 bits")
    model = open_model(request.folder, request.device, request.cache)
    forward = model.quantized_draft(request.act_bits)
    return OpenedModel(model, lambda: SelfDraft(forward, model.block_size))


def open_quantspec(request: SpecRequest) -> OpenedModel:
    """Load a model that drafts for itself from the upper half of its cache.

    Raises:
        RequestError: another KV dtype is asked for.
        QuantkitError: the model cannot be loaded, or the cache is too small.
    """
    asked = request.cache.dtype
    if asked not in ("auto", _HIERARCHICAL):
        cannot = f"drafts from an {_HIERARCHICAL} cache, and --kv-dtype is {asked}"
        raise RequestError(f"--spec {request.spec}: {cannot}; leave it out")
    model = open_model(request.folder, request.device, replace(request.cache, dtype=_HIERARCHICAL))
    return OpenedModel(model, lambda: SelfDraft(partial(model.forward, draft=True), model.block_size))

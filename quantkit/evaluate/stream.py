"""Final hidden states of a model that never is in memory as a whole: one block at a time over all windows."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.artifact import dense_source
from quantkit.blocks import BlockModel
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import NumericsError

#: Tokens that run through a block at once.
_BATCH_TOKENS = 4096


def open_model(checkpoint: Checkpoint, device: torch.device) -> BlockModel:
    """A model to be evaluated, in float32: what is measured is the weights, not the rounding of activations.

    Raises:
        CheckpointError, FormatError: it cannot be read.
    """
    return BlockModel(checkpoint, dense_source(checkpoint), torch.float32, device)


@torch.no_grad()
def final_hidden(model: BlockModel, tokens: Tensor, advance: Callable[[int, int], None]) -> Tensor:
    """Output of the last block, float32 [windows, T, D] on the CPU.

    Args:
        model: the model.
        tokens: int64 [windows, T].
        advance: called with (blocks done, blocks) after each.

    Raises:
        NumericsError: the model overflows.
    """
    rows = max(1, _BATCH_TOKENS // tokens.shape[1])
    hidden = torch.empty(*tokens.shape, model.config.hidden_size)
    kwargs = {}
    for batch, target in zip(tokens.split(rows), hidden.split(rows), strict=True):
        entered, kwargs[len(batch)] = model.embed(batch)
        target.copy_(entered)
    for index in range(model.count):
        with model.block(index) as block:
            for part in hidden.split(rows):
                out = block(part.to(model.device), **kwargs[len(part)][index])
                part.copy_(out[0] if isinstance(out, tuple) else out)
        if not bool(hidden.isfinite().all()):
            raise NumericsError(f"{model.checkpoint.folder}: {model.prefix(index)[:-1]} gives NaN or Inf")
        advance(index + 1, model.count)
    return hidden

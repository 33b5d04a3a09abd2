"""Final hidden states of a model that never is in memory as a whole: one block at a time over all windows."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantkit.artifact import dense_source
from quantkit.blocks import BlockModel
from quantkit.checkpoint.reader import Checkpoint
from quantkit.definition import realise_buffers
from quantkit.errors import NumericsError
from quantkit.runtime.load import Source, load_block

#: Tokens that run through a block at once.
_BATCH_TOKENS = 4096


class PackedBlockModel(BlockModel):
    """A block model whose matrices stay packed and run through the engine's kernels."""

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with kernel-ready weights; they are released when the context ends."""
        module = copy.deepcopy(self._blocks[index])
        realise_buffers(self._model, module, self.device)
        load_block(module, self.prefix(index), self.family, Source(self.checkpoint), self.device, self.dtype)
        yield module


def open_model(checkpoint: Checkpoint, device: torch.device, *, packed: bool = False) -> BlockModel:
    """A model to be evaluated.

    Args:
        checkpoint: a checkpoint or an artifact.
        device: where it is computed.
        packed: run packed matrices through the engine's kernels, with activations as the engine has them; otherwise all
            is dequantized and in float32, so that what is measured is the weights and no rounding of activations.

    Raises:
        CheckpointError, FormatError: it cannot be read.
    """
    kind = PackedBlockModel if packed else BlockModel
    dtype = torch.bfloat16 if packed and device.type == "cuda" else torch.float32
    return kind(checkpoint, dense_source(checkpoint), dtype, device)


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
                out = block(part.to(model.device, model.dtype), **kwargs[len(part)][index])
                part.copy_(out[0] if isinstance(out, tuple) else out)
        if not bool(hidden.isfinite().all()):
            raise NumericsError(f"{model.checkpoint.folder}: {model.prefix(index)[:-1]} gives NaN or Inf")
        advance(index + 1, model.count)
    return hidden

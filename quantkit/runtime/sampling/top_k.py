"""The k largest logits of each row, many times faster on a CPU than `topk` over a whole vocabulary.

`amax` runs at the speed of memory, `topk` does not. So each row is cut into chunks, and only the k chunks with the largest
maxima are searched. They contain the k largest values: for a value in any other chunk there are k chunk maxima that are no
smaller. `topk` is used directly if the vocabulary is not a multiple of the chunk size, or if k chunks would cover all of it.
"""

import torch
from torch import Tensor

from quantkit.kernels.cpu.row_max import row_max

#: Logits per chunk; the vocabulary sizes of current models are multiples of it.
_CHUNK = 32


def argmax(logits: Tensor) -> list[int]:
    """Place of the largest value of each row of float32 [R, V]; of equal ones the first, like `torch.argmax`."""
    return row_max(logits)[1]


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row in falling order, equal ones by id: values float32, ids int64, both [R, count].

    If several values equal the smallest one returned, it is not defined which of them are returned, unless `count` is V.
    """
    vocab = logits.shape[1]
    if count == vocab:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    if vocab % _CHUNK == 0 and count * _CHUNK < vocab:
        chunks = logits.unflatten(1, (-1, _CHUNK)).amax(-1).topk(count, sorted=False).indices
        where = (chunks[:, :, None] * _CHUNK + torch.arange(_CHUNK, device=logits.device)).flatten(1)
        ids = where.gather(1, logits.gather(1, where).topk(count, sorted=False).indices)
    else:
        ids = logits.topk(count, sorted=False).indices
    ids = ids.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)

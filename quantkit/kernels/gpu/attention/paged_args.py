"""What the paged kernels take: tensors, checked for what the kernels rely on, and how scores become exponents of 2."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.gpu.attention.paged_tile import LOG2E
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV, block_tensors

#: A window that masks nothing; small enough that position - window does not overflow int32.
NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class ScoreParams:
    """How a raw dot product x becomes an exponent of 2: x * scale, or cap * (1 - 2 / (1 + exp2(x * scale))) = cap *
    tanh(..).
    """

    scale: float
    cap: float
    window: int

    @classmethod
    def of(cls, scale: float, window: int, softcap: float) -> "ScoreParams":
        """Convert the arguments of `paged_attention`."""
        window = window if window > 0 else NO_WINDOW
        if softcap > 0:
            return cls(2 * LOG2E.value * scale / softcap, LOG2E.value * softcap, window)
        return cls(LOG2E.value * scale, 0.0, window)


@dataclass(frozen=True)
class AttentionArgs:
    """The arguments of one attention call, which both kernels take.

    Attributes:
        query, key_cache, value_cache, block_table, query_start, seq_lens, sinks, draft: as for `paged_attention`.
        out: [T, Hq, Dv], contiguous.
        scores: scale, soft cap and window.
    """

    query: Tensor
    key_cache: Cache
    value_cache: Cache
    block_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    sinks: Tensor | None
    out: Tensor
    scores: ScoreParams
    draft: bool = False

    @property
    def ratio(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key_cache.shape[2]

    def visible(self, new: int) -> int:
        """Upper bound, from shapes alone, of the tokens that the newest `new` tokens of a sequence see."""
        return min(self.block_table.shape[1] * self.key_cache.shape[1], self.scores.window + new - 1)

    def check(self) -> None:
        """Assert the shapes, dtypes and strides that `reference.paged_attention` documents and the kernels rely on."""
        query, (sequences, _), block_size = self.query, self.block_table.shape, self.key_cache.shape[1]
        assert query.shape[2] == self.key_cache.shape[3], (query.shape, self.key_cache.shape)
        assert query.shape[1] % self.key_cache.shape[2] == 0, (query.shape, self.key_cache.shape)
        assert self.key_cache.shape[:3] == self.value_cache.shape[:3], (self.key_cache.shape, self.value_cache.shape)
        assert block_size & (block_size - 1) == 0, block_size
        for cache in (self.key_cache, self.value_cache):
            assert all(plane.is_contiguous() for plane in block_tensors(cache))
            assert isinstance(cache, QuantizedKV) or cache.dtype in (query.dtype, torch.float8_e4m3fn), (
                query.dtype,
                cache.dtype,
            )
        numbers = self.block_table, self.query_start, self.seq_lens
        assert all(x.stride(-1) == 1 for x in (query, *numbers))
        assert (len(self.query_start), len(self.seq_lens)) == (sequences + 1, sequences)
        assert all(x.dtype == torch.int32 for x in numbers)
        sinks = self.sinks
        assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == query.shape[1:2] and sinks.is_contiguous())

"""How a quantized KV cache stores the keys, or the values, of one layer: as x = scale * code + minimum.

int8: codes 0 .. 255. Each token and head has a scale and a minimum. A token is quantized when it is written.

int4 (KIVI, arXiv 2402.02750): codes 0 .. 15. Keys have a scale and a minimum per page and channel, because a few channels are
large in all tokens; values have them per token and head. A page is a block. It can only be quantized when its last token is
known. So new tokens are written to a 16-bit copy of their page, its tail page, which is kept as long as it may change.

4+4 bit (QuantSpec, arXiv 2502.10424): int4, plus the residual (x - upper) / (scale / 16) in another 4 bits: -8 .. 7, stored
plus 8. The upper 4 bits alone are the int4 cache, so a draft reads half as many bytes as the verification.

The page rule: a query sees its own page in 16 bit, and all earlier pages quantized. That depends on positions only. So a
token's output is the same in any batch, however a prompt is cut into steps, and after a cached prefix.

QuantSpec verifies with the newest 128 to 256 tokens in 16 bit. Such a buffer would extend into earlier pages, so these could
not be shared, fetched or continued without their 16-bit copies. There is also nothing to gain: on SmolLM2-135M, 4+4 bit has a
KL of 0.00008 and bfloat16 one of 0.00004, and 96% of 4-token drafts after 4,096 tokens of text are accepted.

A page is quantized from its tail page whenever its last slot is written. If that was a draft token and is rejected, the tail
page still exists, later tokens overwrite it, and the page is quantized again when it is full again. The first version is never
read, because only queries after the page read it.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values of one layer.

    Attributes:
        codes: uint8 [num_blocks, block_size, H, D]. For int4 and 4+4 bit [num_blocks, block_size, H, D / 2]: byte j holds
            element j in its lower and element j + D / 2 in its upper 4 bits.
        params: float16 scale and minimum: [num_blocks, block_size, H, 2] per token and head, or [num_blocks, H, 2, D] per page
            and channel.
        by_channel: whether `params` are per page and channel.
        lower: for 4+4 bit, the lower 4 bits, laid out like `codes`; else None.
        tail_pages: for int4 and 4+4 bit, 16-bit floating [number of tail pages, block_size, H, D]; else None.
        tail_page_ids: int32 [num_blocks], the tail page of each block that has one, arbitrary for other blocks; None without
            tail pages.
    """

    codes: Tensor
    params: Tensor
    by_channel: bool = False
    lower: Tensor | None = None
    tail_pages: Tensor | None = None
    tail_page_ids: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.tail_pages is None) == (self.tail_page_ids is None)
        assert self.tail_pages is not None or not (self.by_channel or self.lower is not None)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """num_blocks, block_size, H, D."""
        blocks, block_size, heads, bytes_ = self.codes.shape
        return blocks, block_size, heads, bytes_ if self.tail_pages is None else 2 * bytes_

    @property
    def block_tensors(self) -> tuple[Tensor, ...]:
        """The tensors whose first dimension is the block."""
        return (self.codes, self.params) if self.lower is None else (self.codes, self.params, self.lower)

    @property
    def nbytes(self) -> int:
        """Size in bytes, tail pages included."""
        return sum(tensor.nbytes for tensor in self.block_tensors) + (0 if self.tail_pages is None else self.tail_pages.nbytes)


#: Keys or values of one layer: a plain tensor [num_blocks, block_size, H, D], or quantized.
Cache = Tensor | QuantizedKV


def block_tensors(cache: Cache) -> tuple[Tensor, ...]:
    """The tensors of a cache whose first dimension is the block."""
    return cache.block_tensors if isinstance(cache, QuantizedKV) else (cache,)

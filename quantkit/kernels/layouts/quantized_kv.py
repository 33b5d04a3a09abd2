"""What a quantized KV cache holds of one layer: keys, or values, as x = scale * code + minimum.

int8: codes 0 .. 255; every token and head has its scale and minimum. A token is quantized when it is written.

int4 (KIVI, arXiv 2402.02750): codes 0 .. 15. Keys have a scale and a minimum for every channel of a page, because a few
channels are large in all tokens; values have them for every token and head. A page is a block. It can only be quantized when
its last token is known, so new tokens go to a 16-bit copy of their page, its open page, which is kept while it may change.

4+4 bit (QuantSpec, arXiv 2502.10424): the same, and in a plane of its own the rest (x - upper) / (scale / 16), which is
-8 .. 7, plus 8. The upper plane alone is the int4 cache, so a draft reads half the bytes of the verification.

The rule of pages: a query sees its own page in 16 bit, and every earlier page quantized. That depends on positions only, so a
token's output is the same however a prompt is cut into steps, in any batch, and behind a cached prefix.

QuantSpec verifies with its newest 128 to 256 tokens in 16 bit. Such a buffer would reach into earlier pages, which then could
not be shared, fetched or begun behind without their 16-bit copies. Nor is there anything to gain: on SmolLM2-135M 4+4 bit cost
a KL of 0.00008 and bfloat16 one of 0.00004, and of 4-token drafts behind 4,096 tokens of text 96% are accepted.

A page is quantized from its open page whenever its last slot is written. Where that was a draft token and is rejected, the
open page is still there, later tokens overwrite it, and the page is quantized again when it is full again: nobody reads the
first version, because all who do stand behind the page.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QuantizedKV:
    """Keys or values of one layer.

    Attributes:
        codes: uint8 [num_blocks, block_size, H, D]; of int4 [num_blocks, block_size, H, D / 2], byte j holding element j in
            its lower and element j + D / 2 in its upper half.
        params: float16 scale and minimum: [num_blocks, block_size, H, 2] of a token and head, [num_blocks, H, 2, D] of a
            page's channels.
        by_channel: which of the two.
        lower: of 4+4 bit, the lower plane, laid out as `codes`.
        tail_pages: of pages, 16-bit floating [open pages, block_size, H, D].
        tail_page_ids: of pages, int32 [num_blocks], the open page of each block that has one; arbitrary for others.
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
        """What is stored a block, the first dimension being the block."""
        return (self.codes, self.params) if self.lower is None else (self.codes, self.params, self.lower)

    @property
    def nbytes(self) -> int:
        """Size in bytes, open pages included."""
        return sum(plane.nbytes for plane in self.block_tensors) + (0 if self.tail_pages is None else self.tail_pages.nbytes)


#: Keys or values of one layer: plain numbers [num_blocks, block_size, H, D], or quantized.
Cache = Tensor | QuantizedKV


def block_tensors(cache: Cache) -> tuple[Tensor, ...]:
    """What is stored a block, of either kind."""
    return cache.block_tensors if isinstance(cache, QuantizedKV) else (cache,)

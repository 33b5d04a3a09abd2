"""What a KV dtype is. Each choice of `--kv-dtype` implements `KVDtype` in a file of its own; `dtypes.KV_DTYPES` lists them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.kernels.layouts.quantized_kv import Cache


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token: KV heads, and the width of a key head and of a value head."""

    heads: int
    key_width: int
    value_width: int


class Tokens(NamedTuple):
    """The slots of a cache, as the leading dimensions of its tensors."""

    num_blocks: int
    block_size: int
    heads: int


@dataclass(frozen=True)
class TailStorage:
    """The 16-bit pages of one layer in which incomplete blocks are kept, see `tail_pages`.

    Attributes:
        count: pages.
        page_ids: int32 [num_blocks], the page of each block that has one.
    """

    count: int
    page_ids: Tensor


class KVDtype(ABC):
    """A choice of `--kv-dtype`: everything that the cache needs to know about it.

    Attributes:
        block_size: tokens per block where the user chooses none.
        has_tail_pages: a block is quantized as a whole, so an incomplete block is kept in a 16-bit tail page.
    """

    #: Short blocks: prefixes are shared and evicted in fine steps.
    block_size = 16
    has_tail_pages = False

    @abstractmethod
    def storage_dtype(self, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device) -> torch.dtype:
        """The dtype of unquantized numbers and of tail pages.

        Args:
            declared: the checkpoint's dtype.
            layers: what is to be stored.
            device: where the cache will be.

        Raises:
            ResourceError: this device, or heads of these widths, cannot have such a cache.
        """

    @abstractmethod
    def allocate(
        self, tokens: Tokens, width: int, dtype: torch.dtype, device: torch.device, *, keys: bool, tail: TailStorage | None
    ) -> Cache:
        """Uninitialized storage for the keys or the values of one layer.

        Args:
            tokens: slots of the cache.
            width: elements per head.
            dtype: from `storage_dtype`.
            device: where; on the meta device only sizes are right.
            keys: keys, not values.
            tail: given if `has_tail_pages`.
        """

    def label(self, name: str, dtype: torch.dtype) -> str:
        """What the user sees as the type of a cache: `name` of the choice, or something more precise."""
        return name

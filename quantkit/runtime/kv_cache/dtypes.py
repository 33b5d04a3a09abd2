"""How a KV cache stores numbers (`--kv-dtype`): the tensors of a layer, from which its size follows.

bits a number, at heads of 64 elements and blocks of 32 tokens: bf16 16, fp8 8, int8 8.5, int4 4.5 (values) and 5 (keys).
`kernels.kv_store` describes the quantized ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ResourceError
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV

#: Names of `--kv-dtype`. "auto" is the checkpoint's own type.
KV_DTYPES = ("auto", "bf16", "fp8", "int8", "int4", "int4+4")

#: Tokens in a block; of pages, in a block whose keys share a scale a channel (KIVI's group; QuantSpec's has 128).
#: On SmolLM2-135M (2 x 1,024 tokens) pages of 32, 64 and 128 cost a KL of 0.0075, 0.0080 and 0.0083 with int4 and of 0.00008,
#: 0.00008 and 0.00009 with int4+4, and 6,840, 6,480 and 6,300 bytes a token; of 4-token drafts behind 768 tokens 91 to 94%, 93
#: to 98% and 88 to 94% are accepted, which is no clear order. So the shortest: prefixes are shared and evicted in finer steps,
#: and 16-bit open pages take a quarter of the memory.
_BLOCK, _PAGE = 16, 32
#: Names of formats whose blocks are quantized as a whole, which takes open pages.
_PAGED = ("int4", "int4+4")


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token: KV heads, and the width of a key and of a value head."""

    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class CacheFormat:
    """A choice of `--kv-dtype`.

    Attributes:
        name: as the user knows it.
        dtype: of plain numbers, or of open pages, which are 16-bit.
    """

    name: str
    dtype: torch.dtype

    @property
    def paged(self) -> bool:
        """Whether blocks are quantized as a whole, which takes open pages."""
        return self.name in _PAGED

    @property
    def block_size(self) -> int:
        """Tokens in a block where the user has no opinion."""
        return default_block_size(self.name)

    def layer(
        self, shape: LayerShape, num_blocks: int, block_size: int, device: torch.device, open_pages: Tensor | None, pages: int
    ) -> tuple[Cache, Cache]:
        """Keys and values of one layer, uninitialised.

        Args:
            shape: of the layer.
            num_blocks, block_size: of the cache.
            device: where it lies; on the meta device only sizes are right.
            open_pages: int32 [num_blocks], see `QuantizedKV`; None without pages.
            pages: open pages.
        """

        def store(width: int, *, keys: bool) -> Cache:
            def empty(*dims: int, dtype: torch.dtype) -> Tensor:
                return torch.empty(*dims, dtype=dtype, device=device)

            tokens = num_blocks, block_size, shape.heads
            if self.name == "int8":
                return QuantizedKV(empty(*tokens, width, dtype=torch.uint8), empty(*tokens, 2, dtype=torch.float16))
            if not self.paged:
                return empty(*tokens, width, dtype=self.dtype)
            planes = [empty(*tokens, width // 2, dtype=torch.uint8) for _ in range(2 if self.name == "int4+4" else 1)]
            of_scales = (num_blocks, shape.heads, 2, width) if keys else (*tokens, 2)
            lower = planes[1] if len(planes) == 2 else None
            opened = empty(pages, block_size, shape.heads, width, dtype=self.dtype)
            return QuantizedKV(planes[0], empty(*of_scales, dtype=torch.float16), keys, lower, opened, open_pages)

        return store(shape.key_width, keys=True), store(shape.value_width, keys=False)

    def block_bytes(self, layers: Sequence[LayerShape], block_size: int) -> int:
        """Bytes that one block takes over all layers, open pages not counted."""
        return self._bytes(layers, block_size, 1, 0)

    def page_bytes(self, layers: Sequence[LayerShape], block_size: int) -> int:
        """Bytes that one open page takes over all layers; 0 without pages."""
        return self._bytes(layers, block_size, 0, 1) if self.paged else 0

    def _bytes(self, layers: Sequence[LayerShape], block_size: int, blocks: int, pages: int) -> int:
        meta = torch.device("meta")
        table = torch.empty(blocks, dtype=torch.int32, device=meta) if self.paged else None
        caches = (self.layer(layer, blocks, block_size, meta, table, pages) for layer in layers)
        return sum(cache.nbytes for pair in caches for cache in pair)


def plain(dtype: torch.dtype) -> CacheFormat:
    """Numbers as they are, in `dtype`."""
    return CacheFormat(str(dtype).removeprefix("torch."), dtype)


def default_block_size(name: str | torch.dtype) -> int:
    """Tokens in a block of the format that `--kv-dtype` names, where the user has no opinion."""
    return _PAGE if name in _PAGED else _BLOCK


def check_name(name: str | torch.dtype) -> None:
    """Find out before a model is loaded that there is no such format.

    Raises:
        ResourceError: there is none.
    """
    if isinstance(name, str) and name not in KV_DTYPES:
        raise ResourceError(f"--kv-dtype {name}: there is no such type; choose from {', '.join(KV_DTYPES)}")


def cache_format(
    name: str | torch.dtype, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device
) -> CacheFormat:
    """The format that `--kv-dtype` names.

    Args:
        name: of KV_DTYPES; or a type of plain numbers.
        declared: the checkpoint's type.
        layers: what is to be stored.
        device: where.

    Raises:
        ResourceError: there is no such format, or this device or these heads cannot have it.
    """
    check_name(name)
    if isinstance(name, torch.dtype):
        return plain(name)
    if name == "auto":
        return plain(declared)
    if name == "bf16":
        if device.type == "cuda" and declared != torch.bfloat16:
            raise ResourceError(f"--kv-dtype bf16: on a GPU a {declared} model's plain cache has that type; use auto")
        return CacheFormat(name, torch.bfloat16)
    if name == "fp8":
        return CacheFormat(name, torch.float8_e4m3fn)
    odd = next((width for layer in layers for width in (layer.key_width, layer.value_width) if width % 2), None)
    if name != "int8" and odd is not None:
        raise ResourceError(f"--kv-dtype {name}: packs two numbers a byte, the model's heads have {odd}; use int8")
    # Open pages: on a GPU activations have the declared type, so nothing is lost; a CPU's kernels know bfloat16.
    return CacheFormat(name, declared if device.type == "cuda" and declared.itemsize == 2 else torch.bfloat16)

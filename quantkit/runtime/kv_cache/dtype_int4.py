"""The KV dtypes int4 (KIVI, arXiv 2402.02750) and int4+4 (QuantSpec, arXiv 2502.10424); see `kernels.layouts.quantized_kv`.

A block is quantized as a whole, because the keys of a block share one scale per channel. Its tokens are in a 16-bit tail page
until then.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.errors import ResourceError
from quantkit.kernels.layouts.quantized_kv import QuantizedKV
from quantkit.runtime.kv_cache.dtype_base import KVDtype, LayerShape, TailStorage, Tokens


class _Int4(KVDtype):
    """One plane of 4-bit codes; with `two_planes`, the remainder in a second plane that drafts do not read."""

    #: The tokens whose keys share a scale per channel: KIVI's group; QuantSpec's has 128.
    #: On SmolLM2-135M (2 x 1,024 tokens) blocks of 32, 64 and 128 tokens cost a KL of 0.0075, 0.0080 and 0.0083 with int4 and
    #: of 0.00008, 0.00008 and 0.00009 with int4+4, and take 6,840, 6,480 and 6,300 bytes per token. Of 4-token drafts after
    #: 768 tokens 91 to 94%, 93 to 98% and 88 to 94% are accepted, which shows no clear order. So the shortest is taken:
    #: prefixes are shared and evicted in finer steps, and 16-bit tail pages take a quarter of the memory.
    block_size = 32
    has_tail_pages = True

    def __init__(self, name: str, *, two_planes: bool) -> None:
        self._name, self._two_planes = name, two_planes

    def storage_dtype(self, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device) -> torch.dtype:
        """The 16-bit dtype of tail pages: on a GPU that of the activations, so that nothing is lost; on a CPU bfloat16, which
        is what its kernels read.

        Raises:
            ResourceError: a head has an odd width.
        """
        odd = next((width for layer in layers for width in (layer.key_width, layer.value_width) if width % 2), None)
        if odd is not None:
            raise ResourceError(
                f"--kv-dtype {self._name}: packs two numbers per byte, but the head dimension is {odd}; use int8"
            )
        return declared if device.type == "cuda" and declared.itemsize == 2 else torch.bfloat16

    def allocate(
        self, tokens: Tokens, width: int, dtype: torch.dtype, device: torch.device, *, keys: bool, tail: TailStorage | None
    ) -> QuantizedKV:
        """See `KVDtype`."""
        assert tail is not None, "int4 needs tail pages"
        num_blocks, block_size, heads = tokens

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        params = (num_blocks, heads, 2, width) if keys else (*tokens, 2)
        return QuantizedKV(
            codes=empty(*tokens, width // 2, dtype=torch.uint8),
            params=empty(*params, dtype=torch.float16),
            by_channel=keys,
            lower=empty(*tokens, width // 2, dtype=torch.uint8) if self._two_planes else None,
            tail_pages=empty(tail.count, block_size, heads, width, dtype=dtype),
            tail_page_ids=tail.page_ids,
        )


INT4 = _Int4("int4", two_planes=False)
INT4_4 = _Int4("int4+4", two_planes=True)

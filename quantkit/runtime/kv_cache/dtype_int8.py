"""The KV dtype int8: every token and head has its own scale and minimum; see `kernels.layouts.quantized_kv`."""

from collections.abc import Sequence

import torch

from quantkit.kernels.layouts.quantized_kv import QuantizedKV
from quantkit.runtime.kv_cache.dtype_base import KVDtype, LayerShape, TailStorage, Tokens


class _Int8(KVDtype):
    def storage_dtype(self, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device) -> torch.dtype:
        """The checkpoint's dtype; nothing is stored unquantized."""
        return declared

    def allocate(
        self, tokens: Tokens, width: int, dtype: torch.dtype, device: torch.device, *, keys: bool, tail: TailStorage | None
    ) -> QuantizedKV:
        """See `KVDtype`."""
        codes = torch.empty(*tokens, width, dtype=torch.uint8, device=device)
        return QuantizedKV(codes, torch.empty(*tokens, 2, dtype=torch.float16, device=device))


INT8 = _Int8()

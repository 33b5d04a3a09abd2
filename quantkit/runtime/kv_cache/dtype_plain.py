"""KV dtypes that store every number by itself, without scales: the checkpoint's dtype, bfloat16 and float8."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.errors import ResourceError
from quantkit.runtime.kv_cache.dtype_base import KVDtype, LayerShape, TailStorage, Tokens


class _Plain(KVDtype):
    """One tensor [num_blocks, block_size, heads, width] of the storage dtype."""

    def storage_dtype(self, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device) -> torch.dtype:
        """The checkpoint's dtype."""
        return declared

    def allocate(
        self, tokens: Tokens, width: int, dtype: torch.dtype, device: torch.device, *, keys: bool, tail: TailStorage | None
    ) -> Tensor:
        """See `KVDtype`."""
        return torch.empty(*tokens, width, dtype=dtype, device=device)


class _Auto(_Plain):
    """The checkpoint's dtype, which is also what the user sees."""

    def label(self, name: str, dtype: torch.dtype) -> str:
        """Such as "bfloat16"."""
        return str(dtype).removeprefix("torch.")


class _BFloat16(_Plain):
    """bfloat16, also where the checkpoint declares float32."""

    def storage_dtype(self, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device) -> torch.dtype:
        """bfloat16.

        Raises:
            ResourceError: on a GPU, whose kernels want the cache and the activations to be of one dtype.
        """
        if device.type == "cuda" and declared != torch.bfloat16:
            raise ResourceError(
                f"--kv-dtype bf16: on a GPU the unquantized cache of a {declared} model has that dtype; use auto"
            )
        return torch.bfloat16


class _Float8(_Plain):
    """float8 e4m3."""

    def storage_dtype(self, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device) -> torch.dtype:
        """float8 e4m3."""
        return torch.float8_e4m3fn


AUTO = _Auto()
BF16 = _BFloat16()
FP8 = _Float8()

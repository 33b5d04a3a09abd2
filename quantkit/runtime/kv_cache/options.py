"""What the user asks of the KV cache: its size, its dtype, and where blocks go that leave it. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.runtime.kv_cache.dtypes import default_block_size, require_kv_dtype
from quantkit.runtime.kv_cache.eviction import Budget

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CacheOptions:
    """How large the cache is and how it stores numbers.

    Attributes:
        memory: bytes; None takes half of the free memory.
        max_model_len: longest sequence in tokens; None takes the model's context, or as much of it as fits.
        max_batch: most sequences that run at the same time.
        step_tokens: most new tokens per step.
        block_size: tokens per block; None takes the default of the dtype.
        dtype: a name in `dtypes.KV_DTYPES`, or the dtype of unquantized numbers.
        budget: how much of its past a sequence keeps; memory must hold at least that much.
        memory_source: what `memory` is called in error messages.

    Raises:
        ResourceError: there is no such dtype.
        RecipeError: the budget is too small for its policy.
    """

    memory: int | None = None
    max_model_len: int | None = None
    max_batch: int = 64
    step_tokens: int = 512
    block_size: int | None = None
    dtype: "str | torch.dtype" = "auto"
    budget: Budget = field(default_factory=Budget)
    memory_source: str = "--kv-memory"

    def __post_init__(self) -> None:
        # Both are checked here so that mistakes are found before a model is loaded.
        require_kv_dtype(self.dtype)
        self.budget.eviction(self.block_size or default_block_size(self.dtype))


@dataclass(frozen=True)
class OffloadOptions:
    """Where full blocks go when they leave the device.

    Attributes:
        memory: bytes of host memory, including blocks that wait to be written to disk.
        folder: for a file that takes the blocks that host memory has no room for; None: they are dropped.
    """

    memory: int
    folder: Path | None = None

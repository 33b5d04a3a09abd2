"""The choices of `--kv-dtype`. This module is light: names and descriptions are read without importing torch.

To add a KV dtype, write a `KVDtype` in a file of its own and add its line here. Command-line choices, help and error messages
follow.
"""

from typing import TYPE_CHECKING

from quantkit.errors import ResourceError
from quantkit.utils.registry import Registry

if TYPE_CHECKING:
    import torch

    from quantkit.runtime.kv_cache.dtype_base import KVDtype

#: Name -> how numbers are stored. Sizes per number hold for heads of 64 elements and the default block size.
KV_DTYPES: "Registry[KVDtype]" = Registry(
    "KV dtype",
    {
        "auto": ("quantkit.runtime.kv_cache.dtype_plain:AUTO", "the checkpoint's own dtype"),
        "bf16": ("quantkit.runtime.kv_cache.dtype_plain:BF16", "bfloat16"),
        "fp8": ("quantkit.runtime.kv_cache.dtype_plain:FP8", "float8 e4m3, without scales"),
        "int8": ("quantkit.runtime.kv_cache.dtype_int8:INT8", "8.5 bits per number, one scale per token and head"),
        "int4": ("quantkit.runtime.kv_cache.dtype_int4:INT4", "KIVI: 5 bits per number of a key, 4.5 of a value"),
        "int4+4": (
            "quantkit.runtime.kv_cache.dtype_int4:INT4_4",
            "QuantSpec: int4 for drafts and 4 bits more for verification",
        ),
    },
)


def require_kv_dtype(name: "str | torch.dtype") -> None:
    """Refuse an unknown name; a torch dtype always passes.

    Raises:
        ResourceError: there is no such KV dtype.
    """
    if isinstance(name, str) and name not in KV_DTYPES:
        raise ResourceError(f"--kv-dtype {name}: there is no such type; choose from {', '.join(KV_DTYPES)}")


def default_block_size(name: "str | torch.dtype") -> int:
    """Tokens per block where the user chooses none."""
    return KV_DTYPES[name if isinstance(name, str) else "auto"].block_size

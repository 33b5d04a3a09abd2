"""The Hadamard transform on a CPU: by the native kernel, or by torch without one. Both give the same bits."""

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from quantkit.kernels import reference
from quantkit.kernels.cpu import library


def hadamard(x: Tensor, block: int) -> Tensor:
    """x H block by block; see `reference.hadamard`.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        block: a power of two that divides K.

    Returns:
        [..., K] in x's dtype, computed in float32.
    """
    columns = x.shape[-1]
    assert block & (block - 1) == 0, block
    assert columns % block == 0, (columns, block)
    lib = library.load()
    if lib is None or x.dtype == torch.float64:
        return reference.hadamard(x, block)
    out = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    rows = out.numel() // columns
    lib.quantkit_hadamard(c_void_p(out.data_ptr()), c_int64(rows), c_int64(columns), c_int64(block), library.threads())
    return out.to(x.dtype)

"""X^T Y of bfloat16 matrices, summed in float32: natively, on processors with instructions for it (AVX512_BF16).

torch rounds the product of two bfloat16 matrices to bfloat16, so sums over several products would lose their last bits.
"""

from collections.abc import Iterable
from ctypes import CDLL, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.cpu import library


def supported() -> bool:
    """Whether the kernel can run here. The first call on a machine that has the instructions compiles it."""
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    lib = library.load()
    return lib is not None and bool(lib.quantkit_gram_supported())


@dataclass(frozen=True)
class PackedRows:
    """A matrix in the kernel's layout (gram.c).

    Attributes:
        words: int32, the elements of two successive rows in one word.
        rows, columns: shape of the matrix.
    """

    words: Tensor
    rows: int
    columns: int


def pack_rows(x: Tensor, buffer: Tensor | None = None) -> PackedRows:
    """Pack x, bfloat16 [T, K] on the CPU; into the words of `buffer` where they are enough."""
    assert x.dtype == torch.bfloat16, x.dtype
    lib, x, (rows, columns) = _lib(), x.contiguous(), x.shape
    count = lib.quantkit_gram_words(c_int64(rows), c_int64(columns))
    words = torch.empty(count, dtype=torch.int32) if buffer is None or len(buffer) < count else buffer
    lib.quantkit_gram_pack(_pointer(x), c_int64(rows), c_int64(columns), _pointer(words), library.threads())
    return PackedRows(words, rows, columns)


def add_product(sums: Tensor, left: PackedRows, right: PackedRows, columns: Iterable[slice], *, upper: bool = False) -> None:
    """Add left^T right to `sums`. The bits do not depend on the number of threads, nor on how columns are distributed.

    Args:
        sums: float32 [K, K], contiguous.
        left, right: [T, K] each.
        columns: the columns of `sums` that are wanted; no others are changed.
        upper: only what lies on or above the diagonal is wanted. What is below it is undefined afterwards.
    """
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    assert (left.rows, left.columns) == (right.rows, right.columns)
    assert sums.shape == (left.columns, left.columns)
    lib, shape = _lib(), (c_int64(left.rows), c_int64(left.columns))
    for part in _merged(columns):
        limits = (c_int64(part.start), c_int64(part.stop))
        lib.quantkit_gram_add(
            _pointer(left.words), _pointer(right.words), *shape, *limits, int(upper), _pointer(sums), library.threads()
        )


def _lib() -> CDLL:
    lib = library.load()
    assert lib is not None
    return lib


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _merged(parts: Iterable[slice]) -> list[slice]:
    """The same columns in as few slices as possible, each of at least one column."""
    merged: list[slice] = []
    for part in parts:
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        elif part.start < part.stop:
            merged.append(part)
    return merged

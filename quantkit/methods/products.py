"""How Hessians are multiplied: by torch in float32, or by the native kernel in bfloat16 with float32 sums.

Where activations are bfloat16 anyway, products of two of them are exact in float32, so both ways compute the same sums, up to
the order in which terms are added. On processors with AVX512_BF16 the kernel is several times faster.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from quantkit.kernels.cpu import gram

#: How much faster the kernel must be to be chosen. With a margin, the choice does not change from run to run.
_MIN_SPEEDUP = 1.5

#: Shape [T, K] of the matrix with which both ways are timed.
_TIMED = (256, 512)


class Products(Protocol):
    """Adds one micro-batch to the sums of a Hessian."""

    def add_square(self, sums: Tensor, x: Tensor) -> None:
        """Add X^T X, from x [T, K], to `sums`, float32 [K, K]. Only blocks on and above the diagonal are computed."""

    def add_drift(self, sums: Tensor, x: Tensor, reference: Tensor) -> None:
        """Add X^T (X_ref - X), from x and reference [T, K], to `sums`, float32 [K, K]."""

    def free_buffers(self) -> None:
        """Free what is kept from one micro-batch to the next."""


class TorchProducts:
    """Products by torch in float32, for inputs of every dtype and on every device."""

    def __init__(self, blocks: Sequence[slice], drift_blocks: Sequence[slice]) -> None:
        """Computes only these columns of the sums."""
        self._blocks, self._drift_blocks = blocks, drift_blocks
        self._buffers: list[Tensor | None] = [None, None]

    def add_square(self, sums: Tensor, x: Tensor) -> None:
        """See `Products`."""
        wide = self._widened(0, x)
        for block in self._blocks:
            sums[: block.stop, block].addmm_(wide[:, : block.stop].T, wide[:, block])

    def add_drift(self, sums: Tensor, x: Tensor, reference: Tensor) -> None:
        """See `Products`."""
        wide, difference = self._widened(0, x), self._widened(1, reference)
        torch.sub(difference, wide, out=difference)
        for block in self._drift_blocks:
            sums[:, block].addmm_(wide.T, difference[:, block])

    def free_buffers(self) -> None:
        """See `Products`."""
        self._buffers = [None, None]

    def _widened(self, number: int, rows: Tensor) -> Tensor:
        """`rows` as float32 in a buffer of this object, which serves every micro-batch."""
        buffer = self._buffers[number]
        if buffer is None or len(buffer) < len(rows):
            buffer = self._buffers[number] = torch.empty(rows.shape, device=rows.device)
        return buffer[: len(rows)].copy_(rows)


class NativeProducts:
    """Products by the native kernel, for bfloat16 inputs on a CPU.

    The drift's difference is rounded to bfloat16. This errs by less than the rounding of the two activations, which are
    larger than their difference.
    """

    def __init__(self, blocks: Sequence[slice], drift_blocks: Sequence[slice]) -> None:
        """Computes only these columns of the sums."""
        self._blocks, self._drift_blocks = blocks, drift_blocks
        self._buffers: list[Tensor | None] = [None, None]

    def add_square(self, sums: Tensor, x: Tensor) -> None:
        """See `Products`."""
        packed = self._packed(0, x)
        gram.add_product(sums, packed, packed, self._blocks, upper=True)

    def add_drift(self, sums: Tensor, x: Tensor, reference: Tensor) -> None:
        """See `Products`."""
        gram.add_product(sums, self._packed(0, x), self._packed(1, reference - x), self._drift_blocks)

    def free_buffers(self) -> None:
        """See `Products`."""
        self._buffers = [None, None]

    def _packed(self, number: int, rows: Tensor) -> gram.PackedRows:
        """`rows` in the kernel's layout, in a buffer of this object, which serves every micro-batch."""
        packed = gram.pack_rows(rows, self._buffers[number])
        self._buffers[number] = packed.words
        return packed


def products_for(
    dtype: torch.dtype, device: torch.device, blocks: Sequence[slice], drift_blocks: Sequence[slice]
) -> TorchProducts | NativeProducts:
    """What multiplies in `dtype`, as `fastest_products` names it. Where the kernel does not run, torch computes the sums."""
    return (NativeProducts if _is_native(dtype, device) else TorchProducts)(blocks, drift_blocks)


def output_error(changes: Iterable[Tensor], hessian: Tensor, dtype: torch.dtype) -> float:
    """tr(D H D^T), the squared output error of changing a weight by D.

    Args:
        changes: D in slices of rows, float32 [n, K] each.
        hessian: H, float32 [K, K], symmetric.
        dtype: the one to multiply in, as in `products_for`. In bfloat16 D is rounded, H is not: tr(D H D^T) is the inner
            product of H and D^T D, of which only half needs to be computed.
    """
    if not _is_native(dtype, hessian.device):
        return sum((float((change @ hessian).mul_(change).sum()) for change in changes), 0.0)
    whole, square, words = [slice(0, len(hessian))], torch.zeros_like(hessian), None
    for change in changes:
        packed = gram.pack_rows(change.bfloat16(), words)
        gram.add_product(square, packed, packed, whole, upper=True)
        words = packed.words
    terms = square.triu_().mul_(hessian)
    return 2 * float(terms.sum()) - float(terms.diagonal().sum())


def _is_native(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu" and gram.supported()


def fastest_products(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 if inputs of `dtype` are multiplied clearly faster by the native kernel on `device`, else float32.

    The speed is measured, because no flag tells: some processors have the instructions, but are no faster with them.
    """
    if not _is_native(dtype, device):
        return torch.float32
    whole = [slice(0, _TIMED[1])]
    native, plain = (_seconds(way(whole, whole)) for way in (NativeProducts, TorchProducts))
    return torch.bfloat16 if _MIN_SPEEDUP * native < plain else torch.float32


def _seconds(products: Products) -> float:
    """The shortest wall time among a few products."""
    x, sums = torch.ones(_TIMED, dtype=torch.bfloat16), torch.zeros(_TIMED[1], _TIMED[1])
    times = []
    for _ in range(4):
        started = time.perf_counter()
        products.add_square(sums, x)
        times.append(time.perf_counter() - started)
    return min(times)

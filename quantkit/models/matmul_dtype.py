"""Choose the dtype in which matrices are multiplied: the stored one if the processor has instructions for it, else float32.

Without such instructions, 16-bit products run at an eighth of float32's speed. Activations keep the stored dtype in either
case, as they do when the model is served; this halves the memory that they take between two matrices.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: How much faster the stored dtype must be to be chosen. With a margin, the choice does not change from run to run where the
#: two are close.
_MIN_SPEEDUP = 1.5


def fastest_matmul(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 if products in `dtype` are not clearly faster. On a GPU always `dtype`.

    The speed is measured, because no flag tells: some processors have instructions for a dtype but are slower with them.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    return dtype if _MIN_SPEEDUP * _seconds(dtype) < _seconds(torch.float32) else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    """The shortest wall time among a few products in `dtype`."""
    matrix = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        linear(matrix, matrix)
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def matmul_in(dtype: torch.dtype, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, linear layers hold their weights in `dtype` and multiply in it. Outputs have the inputs' dtype."""
    changed, scratch = list(layers), MatmulBuffers(dtype)
    for layer in changed:
        assert isinstance(layer, nn.Linear)
        layer.weight.data = layer.weight.data.to(dtype)
        layer.forward = partial(_forward, layer, scratch)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


class MatmulBuffers:
    """Two buffers that all layers share, for operands and products in another dtype than the stored one.

    They are the largest tensors of a forward pass. Allocating them each time would fragment memory.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """The buffer `name` as [rows, columns] on the device of `like`. Its contents are undefined."""
        size, buffer = rows * columns, self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=self._dtype, device=like.device)
        return buffer[:size].view(rows, columns)


def _forward(layer: nn.Linear, scratch: MatmulBuffers, inputs: Tensor) -> Tensor:
    """x W^T + b, from x [..., K]."""
    weight, bias = layer.weight, layer.bias
    if inputs.dtype == weight.dtype:
        return linear(inputs, weight, bias)
    rows = inputs.reshape(-1, inputs.shape[-1])
    operand = scratch.take("operand", len(rows), rows.shape[1], inputs).copy_(rows)
    product = scratch.take("product", len(rows), len(weight), inputs)
    torch.mm(operand, weight.T, out=product)
    if bias is not None:
        product += bias
    return product.to(inputs.dtype).view(*inputs.shape[:-1], -1)

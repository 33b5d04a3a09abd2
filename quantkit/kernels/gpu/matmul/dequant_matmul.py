"""x W^T + bias for weights of 2, 3, 4 or 8 bits on a GPU: the entry point, which picks the kernel."""

import torch
from torch import Tensor

from quantkit.kernels.autotune import Config, tuner
from quantkit.kernels.gpu.matmul.dequant_gemm import dequant_gemm
from quantkit.kernels.gpu.matmul.dequantize import dequantize
from quantkit.kernels.gpu.matmul.gemm_plan import DENSE, DENSE_ALWAYS_ROWS, candidates, padded_rows
from quantkit.kernels.layouts.planes import PlaneWeight


def dequant_matmul(x: Tensor, weight: PlaneWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias.

    Up to 128 rows of 16-bit activations are multiplied with the packed weight, with float32 sums in a fixed order. More than
    512 rows, and float32 activations, are multiplied with a dense copy, which is made in x's dtype and freed at once. In
    between, the faster of the two is taken.

    Args:
        x: [M, K], float16, bfloat16 or float32, on the current CUDA device (any device under Triton's interpreter).
        weight: of shape (N, K), on the same device.
        bias: floating [N], or None.

    Returns:
        [M, N] in x's dtype.
    """
    assert x.ndim == 2, x.shape
    assert x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert x.dtype in (torch.float16, torch.bfloat16, torch.float32), x.dtype
    assert x.device == weight.device, (x.device, weight.device)
    assert bias is None or bias.shape == weight.shape[:1], (bias is not None and bias.shape, weight.shape)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    x = x if x.stride(1) == 1 else x.contiguous()
    return _run(x, weight, bias, _choose(x, weight, bias))


def _choose(x: Tensor, weight: PlaneWeight, bias: Tensor | None) -> Config:
    """The best known config. Numbers of rows with the same next power of two share a config."""
    rows = padded_rows(x.shape[0])
    if rows > DENSE_ALWAYS_ROWS or x.dtype == torch.float32:
        return DENSE
    configs = candidates(weight.bits, weight.group_size, weight.shape, rows, x.device)
    problem = weight.bits, weight.group_size, *weight.shape, rows, x.dtype
    return tuner(x.device).best("dequant_matmul", problem, configs, lambda config: _run(x, weight, bias, config))


def _run(x: Tensor, weight: PlaneWeight, bias: Tensor | None, config: Config) -> Tensor:
    if config == DENSE:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return dequant_gemm(x, weight, bias, config)

"""What every kernel computes, in plain torch and in float32: the oracles that tests compare the kernels with."""

from torch import Tensor


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """(q - z) * s.

    Args:
        codes: integer [N, K], q.
        scales: floating [N, G], s of each group of columns.
        zeros: integer [N, G], z.
        group_size: columns in a group, K / G; -1 for one group a row.

    Returns:
        float32 [N, K].
    """
    rows, columns = codes.shape
    width = columns if group_size == -1 else group_size
    assert scales.shape == zeros.shape == (rows, columns // width), (codes.shape, scales.shape, zeros.shape, group_size)
    grouped = codes.float().reshape(rows, -1, width) - zeros.float()[..., None]
    return (grouped * scales.float()[..., None]).reshape(rows, columns)


def matmul(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, where W is `dequantize` of the rest.

    Args:
        x: floating [..., K].
        codes, scales, zeros, group_size: as for `dequantize`.
        bias: floating [N].

    Returns:
        float32 [..., N].
    """
    out = x.float() @ dequantize(codes, scales, zeros, group_size).T
    return out if bias is None else out + bias.float()

"""What every kernel computes, in plain torch and float32: the reference that the tests compare the kernels with."""

import torch
from torch import Tensor

from quantkit.kernels.layouts.kv_codec import read_blocks, write_slots
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """(q - z) * s.

    Args:
        codes: integer [N, K], q.
        scales: floating [N, G], s of each group of columns.
        zeros: integer [N, G], z.
        group_size: columns per group, K / G; -1 for one group per row.

    Returns:
        float32 [N, K].
    """
    rows, columns = codes.shape
    width = columns if group_size == -1 else group_size
    assert scales.shape == zeros.shape == (rows, columns // width), (codes.shape, scales.shape, zeros.shape, group_size)
    grouped = codes.float().reshape(rows, -1, width) - zeros.float()[..., None]
    return (grouped * scales.float()[..., None]).reshape(rows, columns)


def dequant_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias, where W = `dequantize`(codes, scales, zeros, group_size).

    Args:
        x: floating [..., K].
        codes, scales, zeros, group_size: as for `dequantize`.
        bias: floating [N].

    Returns:
        float32 [..., N].
    """
    out = x.float() @ dequantize(codes, scales, zeros, group_size).T
    return out if bias is None else out + bias.float()


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize each row symmetrically: q = round(x * m / max|x|), m = 2^(bits-1) - 1, so that x is about q * scale.

    Ties round to the even integer; a row of zeros gets scale 0.

    Args:
        x: floating [M, K], finite.
        bits: 4 or 8; integers are in -7 .. 7 or -127 .. 127.

    Returns:
        int8 [M, K] and float32 [M], max|x| / m.
    """
    int_max = float(2 ** (bits - 1) - 1)
    largest = x.float().abs().amax(-1)
    # A tensor divided by a tensor: for a number divided by a tensor, torch multiplies with the reciprocal and rounds twice.
    inverse = torch.where(largest > 0, torch.full_like(largest, int_max) / largest, 0.0)
    return (x.float() * inverse[:, None]).round().to(torch.int8), largest / int_max


def w4a8_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, activation_bits: int, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias, with each row of x quantized to integers q_x times a scale s_x: the draft pass of QSpec (arXiv
    2410.11305).

        s_x * sum over groups g of s_g * (sum of q_x * q_w - z_g * sum of q_x) + bias

    The inner sums are integers. Arguments as for `dequant_matmul`, x [M, K]; activation_bits as `bits` of `quantize_rows`.

    Returns:
        float32 [M, N].
    """
    inputs, input_scales = quantize_rows(x, activation_bits)
    width = x.shape[1] if group_size == -1 else group_size
    grouped, weights = (matrix.double().unflatten(1, (-1, width)) for matrix in (inputs, codes))
    # Sums of integers are exact in float64.
    sums = torch.einsum("mgk,ngk->mng", grouped, weights) - zeros.double() * grouped.sum(-1)[:, None]
    out: Tensor = (input_scales.double()[:, None] * (sums * scales.double()).sum(-1)).float()
    return out if bias is None else out + bias.float()


def hadamard(x: Tensor, block: int) -> Tensor:
    """x H for each run of `block` elements of the last dimension, with the orthonormal Hadamard matrix in Sylvester's order:

        H_1 = 1,  H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)

    H is symmetric, and thus its own inverse. The fast Walsh-Hadamard transform takes log2(block) steps of sums and
    differences, neighbours first. All kernels add in that order, so they agree to the bit.

    Args:
        x: floating [..., K].
        block: a power of two that divides K.

    Returns:
        [..., K] in x's dtype; computed in float32 (float64 for a float64 x).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, block))
    step = 1
    while step < block:
        first, second = wide.unflatten(-1, (-1, 2, step)).unbind(-2)
        wide = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    out: Tensor = (wide * block**-0.5).flatten(-2)
    return out.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, equation 4).

    Args:
        x: floating [..., N].
        weight: floating [N].
        eps: added to the mean square.

    Returns:
        [..., N] in x's dtype; computed in float32 (float64 for a float64 x).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def kv_write(key: Tensor, value: Tensor, key_cache: Cache, value_cache: Cache, slot_mapping: Tensor) -> None:
    """Write new keys and values to their slots of the paged caches, in place, in the format of the caches.

    Args:
        key: [T, Hkv, D].
        value: [T, Hkv, Dv].
        key_cache: [num_blocks, block_size, Hkv, D], contiguous; or quantized.
        value_cache: [num_blocks, block_size, Hkv, Dv], likewise.
        slot_mapping: int64 [T], block * block_size + offset of each token; -1 for padding, which is not written.
    """
    real = slot_mapping >= 0
    for new, cache in ((key, key_cache), (value, value_cache)):
        write_slots(new[real], cache, slot_mapping[real])


def _visible_tokens(cache: Cache, blocks: Tensor, position: int, draft: bool) -> Tensor:
    """The tokens of `blocks` as a query at `position` sees them, [tokens, H, D]; the last block is the query's own page."""
    if isinstance(cache, Tensor) or cache.tail_pages is None:
        return read_blocks(cache, blocks).flatten(0, 1)
    assert cache.tail_page_ids is not None
    own_page = position // cache.tail_pages.shape[1]
    before = read_blocks(cache, blocks[:own_page], draft)
    tail = cache.tail_pages[cache.tail_page_ids[blocks[own_page:]].long()]
    return torch.cat([before, tail.to(before.dtype)]).flatten(0, 1)


def paged_attention(
    query: Tensor,
    key_cache: Cache,
    value_cache: Cache,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    draft: bool = False,
) -> Tensor:
    """Causal attention of each sequence's newest tokens to all of its tokens, whose keys and values are in the paged caches.

    Args:
        query: [T, Hq, D], the new tokens of all sequences, one sequence after the other; Hq is a multiple of Hkv.
        key_cache: [num_blocks, block_size, Hkv, D]; or quantized, where `quantized_kv` says what a query sees.
        value_cache: [num_blocks, block_size, Hkv, Dv], likewise.
        block_table: int32 [S, max_blocks], physical block of each logical block; entries past a sequence's length are
            arbitrary and not read.
        query_start: int32 [S + 1], first row of each sequence in `query`; the last entry is T.
        seq_lens: int32 [S], tokens in the cache, the new ones included. Query i of n is at position seq_lens - n + i;
            a query at a negative position (padding: seq_lens is 0) sees nothing and its output is zero.
        scale: factor of the scores.
        window: if above 0, the query at position p sees only the keys p - window + 1 .. p.
        softcap: if above 0, scores become softcap * tanh(scores / softcap).
        sinks: float [Hq], an additional logit per query head, which takes part in the softmax and has no value.
        draft: read only the upper 4 bits of 4+4-bit caches.

    Returns:
        [T, Hq, Dv] in the query's dtype; computed in float32 (float64 for a float64 query).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:2], value_cache.shape[-1])
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    block_size = key_cache.shape[1]
    for sequence, length in enumerate(lengths):
        row, stop = starts[sequence], starts[sequence + 1]
        while row < stop:
            position = length - (stop - row)
            # Queries of the same page see the same numbers. Without tail pages, all queries of a sequence do.
            paged = isinstance(key_cache, QuantizedKV) and key_cache.tail_pages is not None
            last = min(stop, row + block_size - position % block_size) if paged else stop
            end = length - (stop - last)
            blocks = block_table[sequence, : -(-max(end, 0) // block_size)].long()
            keys, values = (
                _visible_tokens(c, blocks, position, draft)[: max(end, 0)].to(wide) for c in (key_cache, value_cache)
            )
            positions = torch.arange(position, end, device=query.device)
            part = slice(row, last)
            out[part] = _attention(query[part].to(wide), keys, values, positions, scale, window, softcap, sinks).to(out.dtype)
            row = last
    return out


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """`paged_attention` for one sequence: query [n, Hq, D] at `positions` [n], keys [L, Hkv, D], values [L, Hkv, Dv]."""
    ratio = query.shape[1] // keys.shape[1]
    scores = torch.einsum("nhd,lhd->hnl", query, keys.repeat_interleave(ratio, dim=1)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    tokens = torch.arange(len(keys), device=query.device)
    hidden = tokens > positions[:, None]
    if window > 0:
        hidden |= tokens <= positions[:, None] - window
    scores = scores.masked_fill(hidden, float("-inf"))
    extra = scores.new_full((len(scores),), float("-inf")) if sinks is None else sinks.to(scores)
    scores = torch.cat([scores, extra[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1)
    # For a row that sees nothing, the softmax is 0 / 0.
    weights = torch.softmax(scores, dim=-1)[..., :-1].masked_fill(hidden, 0.0)
    return torch.einsum("hnl,lhd->nhd", weights, values.repeat_interleave(ratio, dim=1))

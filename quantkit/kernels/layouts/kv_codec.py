"""Reads and writes the KV cache in plain torch: what the kernels that read and write it are compared with."""

import torch
from torch import Tensor

from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV

#: The largest finite number of float8 e4m3; the cache saturates there.
FP8_MAX = 448.0


def quantize(x: Tensor, levels: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minima such that scale * code + minimum is about x: scale = (max - min) / levels over `dim`.

    Scale and minimum are rounded to float16 first, and codes are chosen for the rounded values. So the error is at most scale
    / 2 + 2^-11 (|min| + 2 |max - min|), plus 2^-25 (levels + 1) if float16 underflows.

    Returns:
        float32 codes 0 .. levels shaped like x; float16 scale and minimum shaped like x, but with size 1 in `dim`.
    """
    wide = x.float()
    low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
    scale, minimum = ((high - low) / levels).half(), low.half()
    codes = ((wide - minimum.float()) / scale.float()).round().clamp(0, levels)
    return codes.where(scale > 0, torch.zeros_like(codes)), scale, minimum


def write_slots(new: Tensor, cache: Cache, slots: Tensor) -> None:
    """Write keys or values [T, H, D] to slots, int64 [T], of a cache, in place. If that fills a page, quantize the page."""
    if isinstance(cache, Tensor):
        if cache.dtype == torch.float8_e4m3fn:  # torch cannot index float8 tensors.
            new = new.float().clamp(-FP8_MAX, FP8_MAX).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache.flatten(0, 1)[slots] = new.to(cache.dtype)
    elif cache.tail_pages is None:
        codes, scale, minimum = quantize(new, 255, -1)
        cache.codes.flatten(0, 1)[slots] = codes.to(torch.uint8)
        cache.params.flatten(0, 1)[slots] = torch.cat([scale, minimum], -1)
    else:
        assert cache.tail_page_ids is not None
        block_size = cache.tail_pages.shape[1]
        blocks, offsets = slots // block_size, slots % block_size
        cache.tail_pages[cache.tail_page_ids[blocks].long(), offsets] = new.to(cache.tail_pages.dtype)
        quantize_pages(cache, blocks[offsets == block_size - 1])


def quantize_pages(store: QuantizedKV, blocks: Tensor) -> None:
    """Quantize full pages, int64 [n], from their tail pages."""
    assert store.tail_pages is not None
    assert store.tail_page_ids is not None
    pages = store.tail_pages[store.tail_page_ids[blocks].long()].float()
    codes, scale, minimum = quantize(pages, 15, 1 if store.by_channel else -1)
    params = torch.stack([scale[:, 0], minimum[:, 0]], 2) if store.by_channel else torch.cat([scale, minimum], -1)
    store.codes[blocks], store.params[blocks] = _pack(codes), params
    if store.lower is not None:
        step = scale.float() / 16
        residual = ((pages - (scale.float() * codes + minimum.float())) / step).round().clamp(-8, 7)
        store.lower[blocks] = _pack(residual.where(step > 0, torch.zeros_like(residual)) + 8)


def _pack(codes: Tensor) -> Tensor:
    """Two codes per byte: the first half of the last dimension in the lower 4 bits, the second half in the upper ones."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.cat([packed & 15, packed >> 4], -1).float()


def read_blocks(cache: Cache, blocks: Tensor, draft: bool = False) -> Tensor:
    """The contents of blocks as floating [n, block_size, H, D]; float32 if the cache is quantized.

    Args:
        cache: keys or values of a layer.
        blocks: int64 [n]; with tail pages, only full blocks.
        draft: for 4+4 bit, read the upper 4 bits only.
    """
    if isinstance(cache, Tensor):
        return cache.view(torch.uint8)[blocks].view(cache.dtype) if cache.dtype == torch.float8_e4m3fn else cache[blocks]
    codes, params = cache.codes[blocks], cache.params[blocks].float()
    scale, minimum = params[:, None].unbind(3) if cache.by_channel else (params[..., :1], params[..., 1:])
    if cache.tail_pages is None:
        return scale * codes.float() + minimum
    if cache.lower is None or draft:
        return scale * _unpack(codes) + minimum
    return scale / 16 * (16 * _unpack(codes) + _unpack(cache.lower[blocks]) - 8) + minimum

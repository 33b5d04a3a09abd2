"""The kernels on quantized caches, compiled for A100 and H100, which needs neither: nothing spills."""

from functools import lru_cache, partial
from itertools import product

import pytest
import torch

from helpers import aot, launches
from quantkit.kernels.gpu.attention import paged_decode, paged_prefill
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs, ScoreParams
from quantkit.kernels.gpu.attention.paged_plan import Device, Problem, decode_configs, prefill_configs
from quantkit.kernels.gpu.kv import kv_write_quantized
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV

A100, H100 = Device(80, 108, 166912), Device(90, 132, 232448)
NAMES = {A100: "A100", H100: "H100"}
#: The kernels of a decode step with the given number of new tokens per sequence; of a prefill; of a write, of keys or values.
DECODE = [(kind, 1, H100) for kind in ("fp8", "int8", "int4", "int4+4")]
DECODE += [(kind, longest, A100) for kind in ("int8", "int4+4") for longest in (1, 8)] + [("int4+4", 8, H100)]
PREFILL = [("fp8", H100), ("int8", A100), ("int4+4", A100), ("int4+4", H100)]
WRITE = [("fp8", True), ("int8", True), ("int4+4", True), ("int4+4", False)]
KV_HEADS, RATIO, DIM, BLOCK_SIZE, SEQUENCES = 8, 4, 128, 32, 4

#: Limit of machine instructions per number of the cache in decoding, against regressions. At 4.3 TB/s an H200 has time for 6.7
#: instructions per byte. So these kernels are bound by instructions, most of all for int4, whose numbers take half a byte.
MOST_INSTRUCTIONS = {"fp8": 12.0, "int8": 9.5, "int4": 12.0, "int4+4": 16.5}


def _empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _cache(kind: str, *, keys: bool) -> Cache:
    tokens = 64, BLOCK_SIZE, KV_HEADS
    if kind == "fp8":
        return _empty(*tokens, DIM, dtype=torch.float8_e4m3fn)
    if kind == "int8":
        return QuantizedKV(_empty(*tokens, DIM, dtype=torch.uint8), _empty(*tokens, 2))
    codes = _empty(*tokens, DIM // 2, dtype=torch.uint8)
    params = _empty(64, KV_HEADS, 2, DIM) if keys else _empty(*tokens, 2)
    lower = codes if kind == "int4+4" else None
    tail_pages = _empty(9, BLOCK_SIZE, KV_HEADS, DIM)
    return QuantizedKV(codes, params, keys, lower, tail_pages, _empty(64, dtype=torch.int32))


def _call(kind: str, tokens: int) -> AttentionArgs:
    query, out = _empty(2, tokens, RATIO * KV_HEADS, DIM)
    numbers = _empty(SEQUENCES, 1024, dtype=torch.int32)
    keys, values = (_cache(kind, keys=keys) for keys in (True, False))
    tensors = query, keys, values, numbers, numbers[0, : SEQUENCES + 1], numbers[0, :SEQUENCES], None, out
    return AttentionArgs(*tensors, ScoreParams.of(0.1, 0, 0.0))


@lru_cache
def _compiled() -> dict[tuple[object, ...], tuple[aot.Job, aot.Compiled]]:
    """All kernels, compiled in one process."""
    jobs: dict[tuple[object, ...], aot.Job] = {}
    for kind, longest, device in DECODE:
        call = _call(kind, SEQUENCES * longest)
        config = decode_configs(Problem.of(call, longest, SEQUENCES), device)[0]
        launch = partial(paged_decode.paged_decode, call, longest, config)
        decode, *_ = launches.jobs(paged_decode, ("decode_kernel", "merge_kernel"), launch, device.capability)
        jobs["decode", kind, longest, device] = decode
    for kind, device in PREFILL:
        call = _call(kind, 4096)
        launch = partial(paged_prefill.paged_prefill, call, 1024, prefill_configs(Problem.of(call, 1024, 4), device)[0])
        [job] = launches.jobs(paged_prefill, ("prefill_kernel",), launch, device.capability)
        jobs["prefill", kind, device] = job
    for (kind, keys), device in product(WRITE, (A100, H100)):
        arguments = _empty(100, KV_HEADS, DIM), _cache(kind, keys=keys), _empty(100, dtype=torch.int64)
        names = ("write_tokens_kernel", "write_tail_kernel", "quantize_pages_kernel")
        launch = partial(kv_write_quantized.write_quantized, *arguments)
        for job in launches.jobs(kv_write_quantized, names, launch, device.capability):
            jobs["write", kind, keys, job.kernel.partition(":")[2], device] = job
    return dict(zip(jobs, zip(jobs.values(), aot.compile_all(list(jobs.values())), strict=True), strict=True))


def _name(value: object) -> str:
    return NAMES[value] if isinstance(value, Device) else str(value)


@pytest.mark.parametrize(("kind", "longest", "device"), DECODE, ids=_name)
def test_decode_does_not_spill(kind: str, longest: int, device: Device) -> None:
    job, found = _compiled()["decode", kind, longest, device]
    assert found.stack == 0
    assert found.shared <= device.shared_memory
    if longest == 1:
        # Counted in the pass over the quantized tokens, which has the longest loop, for keys and values.
        assert found.per_element(2 * DIM * job.constexprs["TILE"]) <= MOST_INSTRUCTIONS[kind]


@pytest.mark.parametrize(("kind", "device"), PREFILL, ids=_name)
def test_prefill_does_not_spill(kind: str, device: Device) -> None:
    _, found = _compiled()["prefill", kind, device]
    assert found.stack == 0
    assert found.shared <= device.shared_memory


def test_writes_do_not_spill() -> None:
    writes = {key: found for key, (_, found) in _compiled().items() if key[0] == "write"}
    assert len(writes) == 2 * (1 + 1 + 2 + 2)
    assert [key for key, found in writes.items() if found.stack] == []

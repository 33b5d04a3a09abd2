"""The kernels on quantized caches as they would run on an A100 and on an H100, compiled without either: nothing spills."""

from functools import lru_cache

import aot
import launches
import pytest
import torch

from quantkit.kernels import kv_write_stored, paged_decode, paged_prefill
from quantkit.kernels.kv_store import Cache, Store
from quantkit.kernels.paged_launch import Device, Scores

A100, H100 = Device(80, 108, 166912), Device(90, 132, 232448)
NAMES = {A100: "A100", H100: "H100"}
DEVICES = (A100, H100)
FORMS = ("fp8", "int8", "int4", "int4+4")
KV_HEADS, RATIO, DIM, BLOCK_SIZE, SEQUENCES = 8, 4, 128, 32, 4

#: Machine instructions for one number of the cache when a token is decoded. A bound against regressions: at 4.3 TB/s an H200
#: has time for 6.7 a byte, which int8 and fp8 are near and int4, whose numbers are half a byte, is not.
MOST_INSTRUCTIONS = {"fp8": 9.0, "int8": 9.0, "int4": 12.0, "int4+4": 16.0}


def _empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _cache(form: str, *, keys: bool) -> Cache:
    tokens = 64, BLOCK_SIZE, KV_HEADS
    if form == "fp8":
        return _empty(*tokens, DIM, dtype=torch.float8_e4m3fn)
    if form == "int8":
        return Store(_empty(*tokens, DIM, dtype=torch.uint8), _empty(*tokens, 2))
    codes = _empty(*tokens, DIM // 2, dtype=torch.uint8)
    params = _empty(64, KV_HEADS, 2, DIM) if keys else _empty(*tokens, 2)
    lower = codes if form == "int4+4" else None
    opened = _empty(9, BLOCK_SIZE, KV_HEADS, DIM)
    return Store(codes, params, keys, lower, opened, _empty(64, dtype=torch.int32))


def _arguments(form: str, tokens: int) -> tuple[object, ...]:
    query, out = _empty(2, tokens, RATIO * KV_HEADS, DIM)
    numbers = _empty(SEQUENCES, 1024, dtype=torch.int32)
    caches = (_cache(form, keys=keys) for keys in (True, False))
    return query, *caches, numbers, numbers[0, : SEQUENCES + 1], numbers[0, :SEQUENCES], None, out


@lru_cache
def _compiled() -> dict[tuple[object, ...], tuple[aot.Job, aot.Compiled]]:
    """Every kernel, compiled by one process."""
    jobs: dict[tuple[object, ...], aot.Job] = {}
    scores = Scores.of(0.1, 0, 0.0)
    for form in FORMS:
        for device in DEVICES:
            for longest in (1, 8):
                arguments = (*_arguments(form, SEQUENCES * longest), scores, longest, device)
                run = lambda a=arguments: paged_decode.paged_decode(*a)  # noqa: E731
                names = ("decode_kernel", "merge_kernel")
                jobs["decode", form, longest, device], *_ = launches.jobs(paged_decode, names, run, device.capability)
            arguments = (*_arguments(form, 4096), scores, 9, 1024, device)
            run = lambda a=arguments: paged_prefill.paged_prefill(*a)  # noqa: E731
            [jobs["prefill", form, device]] = launches.jobs(paged_prefill, ("prefill_kernel",), run, device.capability)
        new, slots = _empty(100, KV_HEADS, DIM), _empty(100, dtype=torch.int64)
        for keys in (True, False):
            cache = _cache(form, keys=keys)
            run = lambda n=new, c=cache, s=slots: kv_write_stored.write_stored(n, c, s)  # noqa: E731
            names = ("row_kernel", "open_kernel", "settle_kernel")
            for job in launches.jobs(kv_write_stored, names, run, 80):
                jobs["write", form, keys, job.kernel.partition(":")[2]] = job
    return dict(zip(jobs, zip(jobs.values(), aot.compile_all(list(jobs.values())), strict=True), strict=True))


def _name(value: object) -> str:
    return NAMES[value] if isinstance(value, Device) else str(value)


@pytest.mark.parametrize("longest", [1, 8])
@pytest.mark.parametrize("device", DEVICES, ids=_name)
@pytest.mark.parametrize("form", FORMS)
def test_decode_does_not_spill(form: str, device: Device, longest: int) -> None:
    job, found = _compiled()["decode", form, longest, device]
    assert found.stack == 0
    assert found.shared <= device.shared_memory
    if longest == 1:
        # Of keys and values, in the pass over the quantized tokens, whose loop is the longest.
        assert found.per_element(2 * DIM * job.constexprs["TILE"]) <= MOST_INSTRUCTIONS[form]


@pytest.mark.parametrize("device", DEVICES, ids=_name)
@pytest.mark.parametrize("form", FORMS)
def test_prefill_does_not_spill(form: str, device: Device) -> None:
    _, found = _compiled()["prefill", form, device]
    assert found.stack == 0
    assert found.shared <= device.shared_memory


def test_writes_do_not_spill() -> None:
    writes = {key: found for key, (_, found) in _compiled().items() if key[0] == "write"}
    assert len(writes) == 2 * (1 + 1 + 2 + 2)
    assert [key for key, found in writes.items() if found.stack] == []

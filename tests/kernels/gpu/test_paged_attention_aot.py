"""The paged kernels, compiled for A100 and H100, which needs neither."""

from functools import cache, partial

import pytest
import torch

from helpers import aot, launches
from quantkit.kernels.autotune import Config
from quantkit.kernels.gpu.attention import paged_decode, paged_prefill
from quantkit.kernels.gpu.attention.paged_args import AttentionArgs, ScoreParams
from quantkit.kernels.gpu.attention.paged_plan import Device, Problem, decode_configs, prefill_configs
from quantkit.kernels.gpu.kv import kv_write

A100, H100 = Device(80, 108, 166912), Device(90, 132, 232448)
NAMES = {A100: "A100", H100: "H100"}
REGISTERS = 65536  # of a multiprocessor, on both
KV_HEADS, BLOCK_SIZE, SEQUENCES = 8, 16, 4

#: Limit of machine instructions per element of the cache. In 16 bit, the 4.3 TB/s of an H200 leave time for 13 instructions,
#: the 1.8 TB/s of an A100 for more. The 8 tokens of a verify step share the elements but not the softmax, so they need more.
MOST_INSTRUCTIONS = {(A100, 1): 4.0, (H100, 1): 4.0, (A100, 8): 12.0, (H100, 8): 6.5}

DECODE = [(dim, longest, device) for device in (A100, H100) for dim, longest in [(64, 1), (128, 1), (128, 8)]]
DECODE += [(256, 1, H100)]
PREFILL = [(128, A100), (128, H100), (256, H100)]


def _name(value: object) -> str:
    return NAMES[value] if isinstance(value, Device) else str(value)


def _call(dim: int, tokens: int) -> AttentionArgs:
    """Arguments without data: 64 query heads for 8 KV heads."""
    caches = torch.empty(2, 64, BLOCK_SIZE, KV_HEADS, dim, dtype=torch.float16, device="meta")
    query, out = torch.empty(2, tokens, 8 * KV_HEADS, dim, dtype=torch.float16, device="meta")
    numbers = torch.empty(SEQUENCES, 1024, dtype=torch.int32, device="meta")
    sinks = torch.empty(8 * KV_HEADS, device="meta")
    tensors = query, caches[0], caches[1], numbers, numbers[0, : SEQUENCES + 1], numbers[0, :SEQUENCES], sinks, out
    return AttentionArgs(*tensors, ScoreParams.of(0.1, 0, 0.0))


def _tiles(configs: list[Config], dim: int) -> list[Config]:
    """Configs that are different kernels. To save time, only the estimate for head dimensions other than 128."""
    different = {tuple(sorted({**config, "splits": 2}.items())): config for config in configs}
    return list(different.values())[: None if dim == 128 else 1]


@cache
def _compiled() -> dict[tuple[object, ...], aot.Compiled]:
    """All kernels, compiled in one process."""
    jobs: dict[tuple[object, ...], aot.Job] = {}
    for dim, longest, device in DECODE:
        call = _call(dim, SEQUENCES * longest)
        for number, config in enumerate(_tiles(decode_configs(Problem.of(call, longest, SEQUENCES), device), dim)):
            launch = partial(paged_decode.paged_decode, call, longest, {**config, "splits": 2})
            decode, merge = launches.jobs(paged_decode, ("decode_kernel", "merge_kernel"), launch, device.capability)
            jobs["decode", dim, longest, device, number] = decode
            if longest == 8:
                jobs["merge", device] = merge
    for dim, device in PREFILL:
        call = _call(dim, 4096)
        for number, config in enumerate(_tiles(prefill_configs(Problem.of(call, 1024, SEQUENCES), device), dim)):
            launch = partial(paged_prefill.paged_prefill, call, 1024, config)
            [job] = launches.jobs(paged_prefill, ("prefill_kernel",), launch, device.capability)
            jobs["prefill", dim, device, number] = job
    call = _call(128, 100)
    key, key_cache = call.query, call.key_cache
    slots = torch.empty(100, dtype=torch.int64, device="meta")
    write = (key[:, :KV_HEADS], key[:, :KV_HEADS], key_cache, key_cache, slots)
    for device in (A100, H100):
        launch = partial(kv_write.kv_write, *write)
        [jobs["write", device]] = launches.jobs(kv_write, ("kv_write_kernel",), launch, device.capability)
    return dict(zip(jobs, aot.compile_all(list(jobs.values())), strict=True))


@pytest.mark.parametrize(("dim", "longest", "device"), DECODE, ids=_name)
def test_decode_reads_faster_than_memory(dim: int, longest: int, device: Device) -> None:
    found = _compiled()["decode", dim, longest, device, 0]
    assert found.stack == 0
    # The elements that a pass reads: only the caches are copied in pieces of 16 bytes.
    elements = found.count("LDGSTS.E.BYPASS.128") * found.threads * 8
    assert elements == 2 * dim * (128 if dim == 64 else 64)
    assert found.per_element(elements) <= MOST_INSTRUCTIONS[device, longest]


@pytest.mark.parametrize(("dim", "device"), [(dim, device) for dim, longest, device in DECODE if longest == 1], ids=_name)
def test_decode_programs_share_a_processor(dim: int, device: Device) -> None:
    # While one program waits for the first bytes of its tile, another computes.
    found = _compiled()["decode", dim, 1, device, 0]
    fit = min(REGISTERS // (found.registers * found.threads), device.shared_memory // found.shared)
    assert fit >= 2


@pytest.mark.parametrize(("dim", "device"), PREFILL, ids=_name)
def test_prefill_fits(dim: int, device: Device) -> None:
    found = _compiled()["prefill", dim, device, 0]
    assert found.stack == 0
    assert found.shared <= device.shared_memory
    # On Hopper, products use warpgroup instructions.
    unit = "HGMMA" if device.capability == 90 else "HMMA"
    assert any(opcode.startswith(unit) for opcode in found.instructions)


@pytest.mark.parametrize("device", [A100, H100], ids=_name)
def test_no_config_spills_or_is_too_large(device: Device) -> None:
    found = {key: made for key, made in _compiled().items() if device in key and key[0] in ("decode", "prefill")}
    assert len(found) >= 12
    wrong = {key: (made.stack, made.shared) for key, made in found.items() if made.stack or made.shared > device.shared_memory}
    assert not wrong


@pytest.mark.parametrize("device", [A100, H100], ids=_name)
@pytest.mark.parametrize("kernel", ["merge", "write"])
def test_small_kernels_do_not_spill(kernel: str, device: Device) -> None:
    assert _compiled()[kernel, device].stack == 0


@pytest.mark.parametrize("device", [A100, H100], ids=_name)
def test_keys_are_stored_in_wide_pieces(device: Device) -> None:
    stores = [opcode for opcode in _compiled()["write", device].instructions if opcode.startswith("STG")]
    assert stores == ["STG.E.128"]

"""The W4A8 kernels, compiled for sm_80 and sm_90: no spills, and few instructions per weight.

A float kernel needs 2.1 instructions per weight at 4 bits (see test_dequant_matmul_aot); bytes need no conversion.
"""

from itertools import product
from typing import Any

import pytest
import torch

from helpers import aot, launches
from quantkit.kernels.gpu.matmul import quantize_rows, split_k, w4a8_gemm
from quantkit.kernels.gpu.matmul.gemm_plan import candidates
from quantkit.kernels.layouts.planes import PlaneWeight

#: (bits, rows) -> limit of instructions per weight with groups of 128. The kernels are within 5% of it.
LEAN: dict[tuple[int, ...], float] = {(2, 8): 1.75, (3, 8): 2.0, (4, 8): 1.7, (8, 8): 1.7}

N, K, GROUP = 4096, 6144, 128


def _weight(bits: int, group: int) -> PlaneWeight:
    """Shapes and types, no data."""
    words = torch.empty(N, K // 16 * (2 if bits == 3 else bits), dtype=torch.int16, device="meta")
    high_bits = torch.empty(N, K // 16, dtype=torch.int16, device="meta") if bits == 3 else None
    qparams = torch.empty(K // group, N, dtype=torch.int32, device="meta")
    return PlaneWeight(words, high_bits, qparams, torch.bfloat16, bits, group, (N, K))


def _gemm(bits: int, rows: int, group: int, capability: int) -> aot.Job:
    """The kernel for the first config, with partial sums."""
    config = {**candidates(bits, group, (N, K), rows, torch.device("cpu"))[0], "splits": 2}
    padded = torch.empty(rows, K, dtype=torch.int8, device="meta")
    sums = torch.empty(K // group, rows, dtype=torch.int32, device="meta")
    x = quantize_rows.QuantizedRows(padded, sums, torch.empty(rows, device="meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_k, "uses_ptx", lambda: True)
        patch.setattr(split_k.SplitKOutput, "reduce", lambda *_: None)
        [job] = launches.jobs(
            w4a8_gemm,
            ("w4a8_gemm_kernel",),
            lambda: w4a8_gemm.w4a8_gemm(x, _weight(bits, group), None, torch.bfloat16, config),
            capability,
        )
    return job


def _quantize_rows(bits: int, group: int, capability: int) -> aot.Job:
    x = torch.empty(4, K, dtype=torch.bfloat16, device="meta")
    [job] = launches.jobs(
        quantize_rows, ("quantize_rows_kernel",), lambda: quantize_rows.quantize_rows(x, 8, bits, group), capability
    )
    return job


def _weights(job: aot.Job) -> int:
    """Weights that one step of a program multiplies."""
    given: dict[str, Any] = job.constexprs
    fields = {2: 4, 3: 8, 4: 2, 8: 1}[given["BITS"]]
    return int(given["BYTES"] * fields * given["LOADS"] * given["BLOCK_N"])


#: The shapes of LEAN, groups smaller than a block, and other block sizes.
SHAPES = [*((bits, rows, GROUP) for bits, rows in LEAN), (4, 8, 32), (4, 16, 64), (4, 128, 64)]
GEMMS: dict[tuple[int, ...], aot.Job] = {(*shape, arch): _gemm(*shape, arch) for shape, arch in product(SHAPES, (80, 90))}
QUANTIZE_ROWS: dict[tuple[int, ...], aot.Job] = {
    (*shape, arch): _quantize_rows(*shape, arch) for shape, arch in product([(4, 64), (3, 96)], (80, 90))
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, ...], aot.Compiled]:
    """All jobs, compiled, by key."""
    jobs = {**GEMMS, **QUANTIZE_ROWS}
    return dict(zip(jobs, aot.compile_all(list(jobs.values())), strict=True))


@pytest.mark.parametrize("key", [*GEMMS, *QUANTIZE_ROWS], ids=str)
def test_nothing_spills(compiled: dict[tuple[int, ...], aot.Compiled], key: tuple[int, ...]) -> None:
    assert compiled[key].stack == 0
    assert compiled[key].shared <= 99 * 1024


@pytest.mark.parametrize("key", [key for key in GEMMS if key[2] == GROUP], ids=str)
def test_gemm_is_lean(compiled: dict[tuple[int, ...], aot.Compiled], key: tuple[int, ...]) -> None:
    job, found = GEMMS[key], compiled[key]
    # A warp's matrix instruction multiplies 16 x 32 weights with 8 rows of x: the loop is one step, and multiplies bytes.
    assert found.count("IMMA") * 512 * found.threads // 32 == _weights(job)
    assert found.per_element(_weights(job)) <= LEAN[key[:2]]

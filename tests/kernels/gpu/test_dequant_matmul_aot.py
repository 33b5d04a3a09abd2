"""The matmul kernels, compiled for sm_80 and sm_90: no spills, and few instructions per weight.

While it reads 4-bit weights at 4.3 TB/s, an H200 can issue about 3.5 instructions per weight (2.9 at a low clock); 2.6 at 3
bits, 1.7 at 2 bits and 7 at 8 bits. So the count decides whether a kernel is limited by memory or by its instructions.
"""

from itertools import product
from typing import Any

import pytest
import torch

from helpers import aot
from quantkit.kernels.gpu.matmul.gemm_plan import Steps, candidates

SIZES = ("M", "N", "K", "x_stride", "words_stride", "high_bits_stride")
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}

#: (bits, type of activations) -> limit of instructions per weight, up to 8 rows, groups of 128. The kernels are within 5% of
#: it.
DECODE = {
    (2, torch.float16): 2.2,
    (3, torch.float16): 2.6,
    (4, torch.float16): 2.1,
    (8, torch.float16): 2.25,
    (2, torch.bfloat16): 2.3,
    (3, torch.bfloat16): 2.8,
    (4, torch.bfloat16): 2.35,
    (8, torch.bfloat16): 3.8,
}

#: Rows -> the same limits for 4 bits and float16, on sm_80 and on sm_90, which multiplies from shared memory.
ROWS = {16: (2.3, 2.3), 32: (2.8, 2.65), 64: (3.75, 2.95), 128: (6.5, 4.6)}

#: Group size -> the same limit for 4 bits and float16.
GROUPS = {32: 2.9, 64: 2.4}

#: Allowed bytes of stack. At 64 rows sm_80 lacks two registers: one value is reloaded per step of 128 matrix instructions.
SPILLS: dict[tuple[object, ...], int] = {("rows", 64, 80): 8}


def _gemm(bits: int, dtype: torch.dtype, rows: int, group: int, capability: int) -> aot.Job:
    """The kernel as `dequant_gemm` calls it for a [4096, 6144] matrix: partial sums of float16, results of bfloat16."""
    shape = (4096, 6144)
    config = candidates(bits, group, shape, rows, torch.device("cpu"))[0]
    steps = Steps.of(bits, group, shape[1])
    bf16 = dtype == torch.bfloat16
    types = {
        "x": TYPES[dtype],
        "words": "*i16",
        "high_bits": "*i16",
        "qparams": "*i32",
        "out": TYPES[dtype] if bf16 else "*fp32",
    }
    signature = {**types, **dict.fromkeys((*SIZES, "steps", "steps_per_split"), "i32")}
    constexprs: dict[str, Any] = {
        "BITS": bits,
        "GROUP": group,
        "BF16_SCALES": bf16,
        "BLOCK_M": rows,
        "BLOCK_N": config["block_n"],
        "WORDS": steps.words,
        "PLANES_PER_SCALE": steps.planes_per_scale,
        "LOADS": steps.loads,
        "PADDED": False,
        "ASSEMBLY": True,
    }
    if bf16:
        signature["bias"] = TYPES[dtype]
    else:
        constexprs["bias"] = None
    kernel = "quantkit.kernels.gpu.matmul.dequant_gemm:gemm_kernel"
    return aot.Job(kernel, signature, constexprs, SIZES[1:], capability, config["warps"], config["stages"])


def _weights(job: aot.Job) -> int:
    """Weights that one step of a program multiplies."""
    columns = job.constexprs["WORDS"] * (16 if job.constexprs["BITS"] == 3 else 16 // job.constexprs["BITS"])
    return int(columns * job.constexprs["LOADS"] * job.constexprs["BLOCK_N"])


JOBS: dict[tuple[object, ...], aot.Job] = {
    **{("decode", *key, arch): _gemm(*key, 8, 128, arch) for key in DECODE for arch in (80, 90)},
    **{("rows", rows, arch): _gemm(4, torch.float16, rows, 128, arch) for rows in ROWS for arch in (80, 90)},
    **{("groups", group, 90): _gemm(4, torch.float16, 8, group, 90) for group in GROUPS},
}
LIMITS: dict[tuple[object, ...], float] = {
    **{("decode", *key, arch): limit for key, limit in DECODE.items() for arch in (80, 90)},
    **{("rows", rows, arch): limit for rows, pair in ROWS.items() for arch, limit in zip((80, 90), pair, strict=True)},
    **{("groups", group, 90): limit for group, limit in GROUPS.items()},
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[object, ...], aot.Compiled]:
    """All jobs, compiled, by key."""
    return dict(zip(JOBS, aot.compile_all(list(JOBS.values())), strict=True))


@pytest.mark.parametrize("key", JOBS, ids=str)
def test_gemm_is_lean(compiled: dict[tuple[object, ...], aot.Compiled], key: tuple[object, ...]) -> None:
    job, found = JOBS[key], compiled[key]
    rows = job.constexprs["BLOCK_M"]
    assert found.stack <= SPILLS.get(key, 0)
    # Eight decode programs of 64 threads fit on a multiprocessor, and any program fits into the smallest shared memory.
    assert found.registers <= (128 if rows == 8 else 255)
    assert found.shared <= 99 * 1024
    # What a step reads is prefetched, scales included, unless a program has more threads than rows of W.
    assert found.count("LDGSTS") > 0
    assert found.count("LDG.") == 0 or rows == 128
    assert found.per_element(_weights(job)) <= LIMITS[key]


def test_the_count_is_of_one_step(compiled: dict[tuple[object, ...], aot.Compiled]) -> None:
    """A warp's matrix instruction multiplies 16 x 16 weights with 8 rows of x, so their number tells how many weights a step
    has.
    """
    for key, job in JOBS.items():
        if key[0] != "rows" and compiled[key].count("HMMA"):
            warps = compiled[key].threads // 32
            assert compiled[key].count("HMMA") * 256 * warps == _weights(job)


def test_the_other_kernels_compile_without_spills() -> None:
    dense = {"words": "*i16", "high_bits": "*i16", "qparams": "*i32", "out": "*bf16", "N": "i32", "K": "i32"}
    dense |= {"words_stride": "i32", "high_bits_stride": "i32"}
    constexprs = {"GROUP": 64, "BF16_SCALES": True, "BLOCK_N": 64}
    jobs = [
        aot.Job("quantkit.kernels.gpu.matmul.dequantize:dequantize_kernel", dense, {"BITS": bits, **constexprs}, (), arch)
        for bits, arch in product((2, 3, 4, 8), (80, 90))
    ]
    types = {"partial": "*fp32", "bias": "*fp16", "out": "*fp16", "N": "i32", "SIZE": "i32"}
    reduce = "quantkit.kernels.gpu.matmul.split_k:reduce_kernel"
    jobs += [aot.Job(reduce, types, {"SPLITS": 16, "BLOCK": 512}, (), arch) for arch in (80, 90)]
    assert [found.stack for found in aot.compile_all(jobs)] == [0] * len(jobs)

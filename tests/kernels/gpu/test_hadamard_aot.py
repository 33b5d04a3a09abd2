"""The Hadamard kernel, compiled for sm_80 and sm_90: no spills, and no more instructions than needed."""

import pytest
import torch

from helpers import aot, launches
from quantkit.kernels.gpu.matmul import hadamard

CASES = [(block, capability) for block in (64, 512, hadamard.LARGEST_BLOCK) for capability in (80, 90)]


def _job(block: int, capability: int) -> aot.Job:
    x = torch.empty(4, 3 * block, dtype=torch.bfloat16, device="meta")
    [job] = launches.jobs(hadamard, ("hadamard_kernel",), lambda: hadamard.hadamard(x, block), capability)
    return job


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, int], aot.Compiled]:
    """All cases, compiled."""
    return dict(zip(CASES, aot.compile_all([_job(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_stays_in_registers(compiled: dict[tuple[int, int], aot.Compiled], case: tuple[int, int]) -> None:
    found, (block, _) = compiled[case], case
    assert found.stack == 0
    # A block passes through shared memory as float32.
    assert found.shared <= 4 * block + 1024
    # One sum or difference per element and step, divided among the program's threads.
    adds = sum(count for opcode, count in found.instructions.items() if opcode.startswith(("FADD", "FFMA")))
    steps = block.bit_length() - 1
    assert adds * found.threads <= 1.5 * steps * max(block, found.threads)

"""Tests of `helpers.aot`, with which other tests measure kernels."""

import pytest
import triton
import triton.language as tl

from helpers import aot

_POINTERS = {"x": "*fp32", "out": "*fp32", "n": "i32"}


@triton.jit
def running_sum(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x + start + tl.arange(0, BLOCK))
    tl.store(out + tl.arange(0, BLOCK), total)


@pytest.fixture(scope="module")
def compiled() -> list[aot.Compiled]:
    """A tile that fits into the registers, and one that does not."""
    sizes = ((80, 1024), (90, 32768))
    return aot.compile_all(
        [aot.Job("test_aot:running_sum", _POINTERS, {"BLOCK": size}, ("n",), capability) for capability, size in sizes]
    )


def test_a_loop_is_found_and_counted(compiled: list[aot.Compiled]) -> None:
    small, _ = compiled
    # 1024 values are 8 per thread of 128: two 16-byte loads and eight additions per pass, and little else. The assembler
    # unrolls the loop.
    passes = small.count("LDG.E.128") // 2
    assert passes in (1, 2, 4, 8)
    assert small.count("FADD") == 8 * passes
    assert 10 < small.per_element(1024 * passes) * 8 < 20


def test_spills_are_seen(compiled: list[aot.Compiled]) -> None:
    small, huge = compiled
    assert small.stack == 0
    assert small.registers < 64
    assert huge.stack > 0


def test_only_innermost_loops_count() -> None:
    sass = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/              @!P0 IADD3 R1, R1, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/              @!P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0040*/                   BRA `(.L_x_2);
"""
    code, loops = aot.read_sass(sass)
    assert code == ["MOV", "IADD3", "BRA", "BRA", "BRA"]
    assert loops == [{"IADD3": 1, "BRA": 1}]

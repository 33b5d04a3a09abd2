"""Kinds of processors that the native kernels can be compiled for.

All of them give the same bits for packed weights. Their vectors have 16 lanes with AVX-512 and 8 otherwise, so sums of floats
differ in their last bits, and inputs of bfloat16 weights are rounded where the processor multiplies bfloat16.
"""

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """A kind of processor.

    Attributes:
        flags: what the compiler is told.
        needs: processor flags, as in /proc/cpuinfo, without which the library cannot run.
    """

    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()


#: The processor at hand. It is what the package uses. Not tuned for it, though: GCC 12's order of
#: instructions for a Zen 4 makes products with float32 weights up to 17% slower on a Zen 5, and no others faster.
NATIVE = Variant(("-march=native", "-mtune=generic"))

_AVX2 = Variant(("-march=x86-64", "-mfma", "-mavx2", "-mf16c"), ("fma", "avx2", "f16c"))
_AVX512 = Variant(
    (*_AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    (*_AVX2.needs, "avx512f", "avx512bw", "avx512vl", "avx512dq"),
)
_AVX512_VNNI = Variant((*_AVX512.flags, "-mavx512vnni"), (*_AVX512.needs, "avx512_vnni"))

#: By name, from the oldest to the newest, and by `platform.machine()`. Fused multiply-adds are always there: results differ
#: without them. What the variants differ in: products of 16-bit integers with AVX2 (8 lanes) and AVX-512BW (16 lanes), of
#: bytes with AVX-VNNI, AVX512_VNNI, and Arm's dotprod and i8mm, and of bfloat16 with AVX512_BF16.
VARIANTS = {
    "x86_64": {
        "fma": Variant(("-march=x86-64", "-mfma"), ("fma",)),
        "avx2": _AVX2,
        "avx_vnni": Variant((*_AVX2.flags, "-mavxvnni"), (*_AVX2.needs, "avx_vnni")),
        "avx512bw": _AVX512,
        "avx512_vnni": _AVX512_VNNI,
        "avx512_bf16": Variant((*_AVX512_VNNI.flags, "-mavx512bf16"), (*_AVX512_VNNI.needs, "avx512_bf16")),
    },
    "aarch64": {
        "neon": Variant(("-march=armv8-a",), ("asimd",)),
        "dotprod": Variant(("-march=armv8.2-a+dotprod",), ("asimddp",)),
        "i8mm": Variant(("-march=armv8.2-a+dotprod+i8mm",), ("asimddp", "i8mm")),
    },
}


def runnable() -> dict[str, Variant]:
    """The variants that run on this processor, by name."""
    found = processor_flags()
    return {name: v for name, v in VARIANTS.get(platform.machine(), {}).items() if found.issuperset(v.needs)}


def processor_flags() -> set[str]:
    """The flags of this processor, as in /proc/cpuinfo."""
    return {word for line in _cpuinfo("flags", "Features") for word in line.partition(":")[2].split()}


def processor() -> str:
    """A description of the processor: what `NATIVE` depends on."""
    lines = _cpuinfo("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted(set(lines))) + platform.machine() + platform.processor()


def _cpuinfo(*keys: str) -> list[str]:
    """The lines of /proc/cpuinfo that begin with one of the keys; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(keys)]
